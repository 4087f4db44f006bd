"""What the ViT and the Swin family share: building Q layers from a scheme, the MLP, patch embedding, heads."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor, nn

from ..exact import Sums
from ..layers import QAct, QActOf, QConv2d, QIntLayerNorm, QIntSoftmax, QLinear
from ..phase import QuantLayer
from ..scheme import QuantScheme
from .sums import layer_scaled, mean

__all__ = [
    'QFFN',
    'LayerFactory',
    'QLinearAct',
    'QNormAct',
    'QPatchEmbed',
    'QPooling',
    'QPositionEncoding',
    'adaptive_padding_of',
    'check_ffn',
    'check_norm',
    'check_patch_embed',
    'is_quantized',
    'link',
    'linked',
]


#: Activations that go on as the identity, so that a copy of a channel can take the next stretch of it.
_SPLITTABLE = (nn.GELU, nn.ReLU, nn.SiLU)


class LayerFactory:
    """Builds Q layers by the scheme's recipe for their kind of tensor.

    Args:
        scheme: the recipe.
        device: where new scales live.
    """

    def __init__(self, scheme: QuantScheme, device: Any) -> None:
        self.scheme = scheme
        self.device = device

    def act(self) -> QAct:
        """Quantizer of an activation that was just computed, has no other reader, and that no block multiplies."""
        return QAct(self.scheme.act, inplace=True).to(self.device)

    def operand(self) -> QAct:
        """Quantizer of an activation that a product in a block reads."""
        return QAct(self.scheme.operand, inplace=True).to(self.device)

    def act_of(self, function: nn.Module) -> QActOf:
        """``function``, GELU for instance, and the quantizer of its result; overwrites its input."""
        return QActOf(function, self.scheme.operand).to(self.device)

    def hidden(self, function: nn.Module, before: Any, after: Any) -> QActOf:
        """``function`` between two linear layers, and the quantizer of its result.

        Where ``after`` reads it as it is (None where something else does), channels may get copies.
        """
        splits = after is not None and isinstance(function, _SPLITTABLE)
        spec = self.scheme.hidden
        if not splits and spec.observer == 'split':
            spec = dataclasses.replace(spec, observer='minmax')
        act = QActOf(function, spec).to(self.device)
        if splits:
            before._output_act = (act,)
        return act

    def act_of_shared(self) -> QAct:
        """Quantizer of a tensor that belongs to somebody else: the image, a parameter."""
        return QAct(self.scheme.act).to(self.device)

    def branch(self, channels: int) -> QAct:
        """Quantizer of what attention, MLP or patch embedding hands to the residual sum, (…, channels)."""
        return QAct(self.scheme.branch, channels, inplace=True).to(self.device)

    def branch_of_shared(self, channels: int) -> QAct:
        """The same of a parameter: a position embedding, (…, channels)."""
        return QAct(self.scheme.branch, channels).to(self.device)

    def norm_input(self, channels: int) -> QAct:
        """Quantizer of a residual stream, which a LayerNorm will read."""
        return QAct(self.scheme.norm_input, channels, inplace=True).to(self.device)

    def softmax(self) -> QIntSoftmax:
        """Softmax with quantized probabilities."""
        return QIntSoftmax(self.scheme.probs, self.scheme.log_int_softmax).to(self.device)

    def linear(self, linear: nn.Linear) -> QLinear:
        """Twin of a linear layer."""
        return QLinear.from_float(linear, self.scheme.weight)

    def conv(self, conv: nn.Conv2d) -> QConv2d:
        """Twin of a convolution."""
        return QConv2d.from_float(conv, self.scheme.edge_weight)

    def norm(self, norm: nn.LayerNorm) -> QIntLayerNorm:
        """Twin of a LayerNorm."""
        return QIntLayerNorm.from_float(norm, self.scheme.int_norm, self.scheme.arithmetic)


def link(module: Any, act: QAct | None) -> None:
    """Let ``module`` know the layer that quantized its input, without owning it."""
    module._input_act = (act,)  # in a tuple, so that it is no submodule and its scale no second state


def linked(module: Any) -> Any:
    """The layer that quantized the input of ``module``; None where nobody told."""
    return module._input_act[0]


class QLinearAct(QLinear):
    """A linear layer whose output is quantized too: a classifier, for instance."""

    out_act: QAct

    @classmethod
    def wrap(cls, linear: nn.Linear, make: LayerFactory, out_act: QAct | None = None) -> QLinearAct:
        """The twin of ``linear`` with a quantizer on its output, by default one for an activation."""
        twin = cls.from_float(linear, make.scheme.edge_weight)
        twin.out_act = make.act() if out_act is None else out_act
        return twin  # type: ignore[return-value]

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """(…, C_in) to (…, C_out), quantized."""
        return self.out_act(super().forward(x, bias))


class QNormAct(QIntLayerNorm):
    """A LayerNorm that knows its input's quantizer and quantizes its output."""

    out_act: QAct
    tile: int

    @classmethod
    def wrap(cls, norm: nn.LayerNorm, input_act: QAct, make: LayerFactory, tile: int = 1) -> QNormAct:
        """The twin of ``norm``, which reads what ``input_act`` quantized, ``tile`` tokens of it side by side."""
        twin: Any = cls.from_float(norm, make.scheme.int_norm, make.scheme.arithmetic)
        twin.out_act, twin.tile = make.act(), tile
        link(twin, input_act)
        return twin

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """(…, C) to (…, C), quantized."""
        return super().forward(x, linked(self), self.out_act, tile=self.tile)


class QPooling(nn.Module):
    """Global average pooling whose output is quantized; the forward of MMPretrain's neck."""

    def __init__(self, neck: Any, make: LayerFactory, input_act: QAct | None = None) -> None:
        super().__init__()
        self.gap = neck.gap
        self.out_act = make.act()
        link(self, input_act)

    def forward(self, inputs: tuple[Tensor, ...] | Tensor) -> tuple[Tensor, ...] | Tensor:
        """A tuple of (B, C, H, W), or one, to (B, C) each."""
        if isinstance(inputs, tuple):
            return (*(self.out_act(self.gap(x).flatten(1)) for x in inputs[:-1]), self._pooled(inputs[-1]))
        return self._pooled(inputs)

    def _pooled(self, x: Tensor) -> Tensor:
        act = linked(self)
        if act is None or not act.is_exact or x.ndim != 4:
            return self.out_act(self.gap(x).flatten(1))
        return self.out_act(mean(x, act, (2, 3)))


class QFFN(nn.Module):
    """The MLP of mmcv and DeiT3 without its residual sum, which belongs to the block.

    ``layers`` keeps the float twin's nesting, so that weights keep their names.
    """

    def __init__(self, ffn: Any, make: LayerFactory) -> None:
        super().__init__()
        (hidden, output, dropout) = ffn.layers  # num_fcs == 2: surgery refuses deeper ones
        linear, activation, hidden_dropout = hidden
        self.layers = nn.Sequential(
            nn.Sequential(make.linear(linear), activation, hidden_dropout),
            make.linear(output),
            dropout,
        )
        self.gamma2 = ffn.gamma2
        self.dropout_layer = ffn.dropout_layer
        self.hidden_act = make.hidden(activation, self.hidden_linear, self.layers[1])
        self.out_act = make.branch(output.out_features)
        link(self.layers[1], self.hidden_act)

    @property
    def hidden_linear(self) -> QLinear:
        """The first linear layer."""
        hidden: Any = self.layers[0]
        linear: QLinear = hidden[0]
        return linear

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        """(B, N, C) to (B, N, C), times the block's layer scale (C,) where the block has it (BEiT)."""
        hidden: Any = self.layers[0]
        # by index, not unpacked: Dynamo of torch 2.1 cannot unpack a Sequential; the activation is part of hidden_act
        x = hidden[2](self.hidden_act(hidden[0](x)))  # (B, N, 4C)
        # Layer scale comes before the quantizer: it is a per-channel factor of the accumulator.
        out: Any = layer_scaled(self.layers[1](x), self.gamma2)
        if scale is not None:
            out = out.times(scale) if isinstance(out, Sums) else scale * out
        return self.dropout_layer(self.layers[2](self.out_act(out)))


def adaptive_padding_of(patches: Any) -> Any:
    """What pads the input of a patch layer, or None; MMSegmentation and MMDetection call it ``adap_padding``."""
    return patches.adaptive_padding if hasattr(patches, 'adaptive_padding') else patches.adap_padding


class QPatchEmbed(nn.Module):
    """mmcv's PatchEmbed: image, convolution, tokens, and a LayerNorm for Swin.

    Args:
        embed: the float module.
        make: builds Q layers.

    The last quantizer is ``patch_act`` without a norm, ``norm_act`` with one.
    """

    def __init__(self, embed: Any, make: LayerFactory) -> None:
        super().__init__()
        self.adaptive_padding = adaptive_padding_of(embed)
        self.projection = make.conv(embed.projection)
        self.norm = None if embed.norm is None else make.norm(embed.norm)
        self.init_input_size, self.init_out_size = embed.init_input_size, embed.init_out_size
        self.input_act = make.act_of_shared() if make.scheme.input_quant else nn.Identity()
        self.patch_act = make.act()
        self.norm_act = None if embed.norm is None else make.act()
        if isinstance(self.input_act, QAct):
            link(self.projection, self.input_act)

    @property
    def last_act(self) -> QAct:
        """The quantizer whose grid the tokens are on."""
        return self.patch_act if self.norm_act is None else self.norm_act

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """(B, 3, H, W) to (B, N, C) tokens and the grid they came from."""
        x = self.input_act(x)
        if self.adaptive_padding is not None:
            x = self.adaptive_padding(x)
        patches: Any = self.projection(x)
        if isinstance(patches, Sums):  # (B, H', W', C)
            out_size = (patches.sums.shape[1], patches.sums.shape[2])
            x = self.patch_act(patches.view(lambda sums: sums.flatten(1, 2)))
        else:
            out_size = (patches.shape[2], patches.shape[3])
            x = self.patch_act(patches.flatten(2).transpose(1, 2))
        if self.norm is not None and self.norm_act is not None:
            x = self.norm(x, self.patch_act, self.norm_act)
        return x, out_size


class QPositionEncoding(nn.Module):
    """Conditional position encoding (Twins, DaViT): a depthwise convolution and the residual sum.

    Args:
        encoding: the float module.
        make: builds Q layers.
        residual_act: the quantizer of the sum.
    """

    def __init__(self, encoding: Any, make: LayerFactory, residual_act: QAct) -> None:
        super().__init__()
        self.proj = make.conv(encoding.proj)
        self.position_act = make.act()
        self.residual_act = residual_act

    def forward(self, x: Tensor, hw_shape: tuple[int, int]) -> Tensor:
        """(B, H W, C) to (B, H W, C), on the grid of ``residual_act``."""
        position = self.proj(x.transpose(1, 2).unflatten(2, hw_shape).contiguous())
        return self.residual_act(self.position_act(position).flatten(2).transpose(1, 2) + x)


def check_norm(norm: Any, path: str) -> None:
    """Refuse norms other than LayerNorm.

    Raises:
        ValueError: names the norm.
    """
    if not isinstance(norm, nn.LayerNorm):
        raise ValueError(f'{path} is a {type(norm).__name__}, not a LayerNorm: not covered')


def check_ffn(ffn: Any, path: str, sums: bool = True) -> None:
    """Refuse MLPs that are not two linear layers with an activation between.

    Args:
        ffn: mmcv's FFN.
        path: its name in the error.
        sums: whether the float block leaves the residual sum to the MLP.

    Raises:
        ValueError: names the MLP.
    """
    if not hasattr(ffn, 'layers') or len(ffn.layers) != 3:
        raise ValueError(f'{path} is a {type(ffn).__name__} with other than two linear layers: not covered')
    if sums and not ffn.add_identity:
        raise ValueError(f'{path} has add_identity=False, without the residual sum: not covered')
    if ffn.add_identity and not sums:
        raise ValueError(f'{path} has add_identity=True, a second residual sum: not covered')


def check_patch_embed(embed: Any) -> None:
    """Refuse patch embeddings other than a convolution, with or without a LayerNorm.

    Raises:
        ValueError: names the part that is not covered.
    """
    if not isinstance(embed.projection, nn.Conv2d):
        raise ValueError(f'patch_embed.projection is a {type(embed.projection).__name__}, not a Conv2d: not covered')
    if embed.norm is not None:
        check_norm(embed.norm, 'patch_embed.norm')


def is_quantized(model: nn.Module) -> bool:
    """Whether surgery was already done on ``model``."""
    return any(isinstance(m, QuantLayer) for m in model.modules())
