"""The results of a sensitivity analysis as frozen values; ``to_dict`` makes JSON of them, ``from_dict`` reads it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ['LEVELS', 'VERSION', 'Effect', 'Entry', 'ImageEffect', 'Sensitivity']

VERSION = 1

#: What is switched as one, from the smallest to the largest.
LEVELS = ('tensor', 'layer', 'block', 'group')


@dataclass(frozen=True)
class Effect:
    """A partly quantized model's outputs against the float model's, over all images.

    Args:
        kl: mean Kullback-Leibler divergence of the class probabilities from the float model's, in nats.
        agree: share of images whose first class is the float model's.
        top1: share of images whose first class is their label; ``None`` without labels.
    """

    kl: float
    agree: float
    top1: float | None = None


@dataclass(frozen=True)
class Entry:
    """One unit: a tensor, or the tensors of a layer, a block or a kind together.

    Args:
        name: path of the Q layer, of the part of the network, or the kind.
        unit: one of :data:`LEVELS`.
        kind: what the tensor is, as :func:`~fqvit_plugin.sensitivity.kinds.kind_of` says; empty for mixed units.
        block: path of the block it is in; empty for groups.
        bits: of the tensor; ``None`` for units of several tensors, and where nothing has bits of its own.
        members: how many Q layers it has.
        weights: how many quantized weights it has, 0 for activations.
        sqnr_db: of the tensor alone, in dB; ``None`` where it was not measured, or nothing was lost.
        only: with this unit quantized and the rest in float; ``None`` if not asked for.
        without: with this unit in float and the rest quantized; ``None`` if not asked for.
    """

    name: str
    unit: str
    kind: str
    block: str
    bits: int | None
    members: int
    weights: int
    sqnr_db: float | None
    only: Effect | None
    without: Effect | None


@dataclass(frozen=True)
class ImageEffect:
    """What quantization did to one image.

    Args:
        index: its number among the images that were measured.
        kl: divergence from the float model, in nats.
        expected, found: first class of the float and of the quantized model.
    """

    index: int
    kl: float
    expected: int
    found: int


@dataclass(frozen=True)
class Sensitivity:
    """All units, and the model with everything quantized.

    Args:
        model: its name.
        images: how many were measured.
        float_top1: share of images that the float model gets right; ``None`` without labels.
        quantized: everything quantized.
        entries: in the order of the network, smaller units first.
        each_image: with everything quantized.
    """

    model: str
    images: int
    float_top1: float | None
    quantized: Effect
    entries: tuple[Entry, ...]
    each_image: tuple[ImageEffect, ...] = ()

    def ranked(self, unit: str, by: str = 'only') -> tuple[Entry, ...]:
        """The entries of one level, the costliest first.

        Args:
            unit: one of :data:`LEVELS`.
            by: ``'only'``, the divergence that the unit causes alone; ``'without'``, what is left without it, the
                least first.
        """
        found = [e for e in self.entries if e.unit == unit and getattr(e, by) is not None]
        sign = 1 if by == 'without' else -1
        return tuple(sorted(found, key=lambda e: sign * getattr(e, by).kl))

    def worst_images(self, count: int) -> tuple[ImageEffect, ...]:
        """Those that quantization changed most."""
        return tuple(sorted(self.each_image, key=lambda image: -image.kl)[:count])

    def to_dict(self) -> dict[str, Any]:
        """Plain values that JSON can hold."""
        return {'version': VERSION, **asdict(self)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Sensitivity:
        """What :meth:`to_dict` gave.

        Raises:
            ValueError: something else, or of another version.
        """
        if not isinstance(data, Mapping) or data.get('version') != VERSION:
            found = data.get('version') if isinstance(data, Mapping) else type(data).__name__
            raise ValueError(f'not a sensitivity analysis of version {VERSION}: found {found!r}')
        try:
            values = {k: v for k, v in data.items() if k != 'version'}
            values['quantized'] = Effect(**values['quantized'])
            values['entries'] = tuple(_entry(e) for e in values['entries'])
            values['each_image'] = tuple(ImageEffect(**e) for e in values.get('each_image', ()))
            return cls(**values)
        except (KeyError, TypeError) as error:
            raise ValueError(f'a damaged sensitivity analysis: {error}') from None


def _entry(data: Mapping[str, Any]) -> Entry:
    effects = {k: None if data[k] is None else Effect(**data[k]) for k in ('only', 'without')}
    return Entry(**{**data, **effects})
