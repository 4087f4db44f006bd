"""What a program says only between the lines: the image's channels and every tensor's shape."""

from __future__ import annotations

import torch

from ..integer.program import IntegerModel, Program

__all__ = ['image_channels', 'shapes_of']


def image_channels(program: Program) -> int:
    """Channels of the images that ``program`` takes.

    Raises:
        ValueError: its first layer is no patch embedding.
    """
    patches = next((op for op in program.ops if op.kind == 'patches'), None)
    readers = [op for op in program.ops if patches is not None and patches.output in op.inputs]
    if patches is None or [op.kind for op in readers] != ['linear']:
        raise ValueError('the program does not begin with a patch embedding: the ONNX export does not cover it')
    height, width = patches.settings['kernel']
    return program.constants[readers[0].constants['weight']].shape[1] // (height * width)


def shapes_of(model: IntegerModel) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor, for one image."""
    channels = image_channels(model.program)
    image = torch.zeros(1, channels, *model.program.image_size, device=model.output_scale.device)
    shapes = {'image': tuple(image.shape)}
    with torch.no_grad():
        for op, tensor in model.steps(image):
            shapes[op.output] = tuple(tensor.shape)
    return shapes
