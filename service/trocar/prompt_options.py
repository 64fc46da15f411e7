"""Prompts on the command line: `--object 1 --point 300,200 --at 0 --object 2 --box 10,20,200,180`.

Options that belong together stand together, so their order counts, which argparse by itself forgets.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from trocar.errors import SourceError
from trocar_engines.masklets import BoolArray, Prompt

DEFAULT_OBJECT_ID = 1


@dataclass(kw_only=True)
class PromptGroup:
    """The prompt options of one `--object`, or of none.

    Args:
        object_id: to prompt.
        frame_id: from `--at`.
        points: x, y and label, 1 on the object and 0 off it.
        box: x_min, y_min, x_max, y_max.
        mask_path: from `--mask`.
    """

    object_id: int
    frame_id: int = 0
    points: list[tuple[float, float, int]] = field(default_factory=list)
    box: tuple[float, float, float, float] | None = None
    mask_path: Path | None = None

    @property
    def is_empty(self) -> bool:
        """Whether nothing was prompted yet."""
        return not self.points and self.box is None and self.mask_path is None

    def to_prompt(self) -> Prompt:
        """Make the prompt to send.

        Raises:
            SourceError: the mask file cannot be read.
        """
        return Prompt(
            object_id=self.object_id,
            frame_id=self.frame_id,
            points=tuple((x, y) for x, y, _ in self.points),
            labels=tuple(label for _, _, label in self.points),
            box=self.box,
            mask=None if self.mask_path is None else read_mask_file(self.mask_path, self.object_id),
        )


def add_prompt_options(parser: argparse.ArgumentParser) -> None:
    """Add `--object`, `--point`, `--box`, `--mask` and `--at`; they fill `namespace.prompt_groups`."""
    options = parser.add_argument_group("prompts (repeat --object before the prompts of each further object)")
    options.set_defaults(prompt_groups=[])
    options.add_argument(
        "--object",
        action=_ObjectAction,
        type=int,
        metavar="ID",
        help="object that the next prompts belong to, 1 to 255 (default 1)",
    )
    options.add_argument(
        "--point",
        action=_PointAction,
        type=parse_point,
        metavar="X,Y[,0|1]",
        help="a pixel on the object (1, default) or off it (0); repeat for more",
    )
    options.add_argument(
        "--box",
        action=_BoxAction,
        type=parse_box,
        metavar="X0,Y0,X1,Y1",
        help="a box around the object, in pixels",
    )
    options.add_argument(
        "--mask",
        action=_MaskAction,
        type=Path,
        metavar="FILE",
        help="an image of the frame's size: the object is where a pixel equals ID or, if none does, is not 0",
    )
    options.add_argument(
        "--at",
        action=_AtAction,
        type=int,
        metavar="FRAME",
        help="frame that this object's prompts were drawn on, from 0 (default 0)",
    )


def parse_point(text: str) -> tuple[float, float, int]:
    """Read x,y or x,y,label."""
    parts = text.split(",")
    if len(parts) not in (2, 3) or (len(parts) == 3 and parts[2] not in ("0", "1")):
        raise argparse.ArgumentTypeError(f"{text!r}: expected X,Y or X,Y,0 or X,Y,1")
    x, y = _parse_numbers(text, parts[:2])
    return x, y, int(parts[2]) if len(parts) == 3 else 1


def parse_box(text: str) -> tuple[float, float, float, float]:
    """Read x0,y0,x1,y1."""
    parts = text.split(",")
    if len(parts) != 4:
        raise argparse.ArgumentTypeError(f"{text!r}: expected X0,Y0,X1,Y1")
    x_min, y_min, x_max, y_max = _parse_numbers(text, parts)
    return x_min, y_min, x_max, y_max


def read_mask_file(path: Path, object_id: int) -> BoolArray:
    """Read an object's mask from an image: paletted or grey.

    Returns:
        bool [H, W].

    Raises:
        SourceError: it is no readable image, or marks nothing.
    """
    try:
        with Image.open(path) as image:
            values = np.asarray(image if image.mode in ("P", "L", "1", "I;16") else image.convert("L"))
    except (OSError, ValueError) as error:
        raise SourceError(f"mask {path} is not a readable image") from error
    mask = values == object_id
    mask = mask if mask.any() else values != 0
    if not mask.any():
        raise SourceError(f"mask {path} has no object pixels: expected some that are not 0")
    return np.asarray(mask, np.bool_)


def _parse_numbers(text: str, parts: Sequence[str]) -> list[float]:
    try:
        return [float(part) for part in parts]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: expected numbers") from None


class _GroupAction(argparse.Action):
    """Hands the value to the group of the last `--object`."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,  # noqa: ARG002
    ) -> None:
        # argparse shares the default between calls of the parser: never append to it in place.
        groups: list[PromptGroup] = list(namespace.prompt_groups)
        if not groups and not isinstance(self, _ObjectAction):
            groups.append(PromptGroup(object_id=DEFAULT_OBJECT_ID))
        self.apply(parser, groups, values)
        namespace.prompt_groups = groups

    def apply(self, parser: argparse.ArgumentParser, groups: list[PromptGroup], value: Any) -> None:
        raise NotImplementedError


class _ObjectAction(_GroupAction):
    def apply(self, parser: argparse.ArgumentParser, groups: list[PromptGroup], value: int) -> None:
        if groups and groups[-1].is_empty:
            parser.error(f"object {groups[-1].object_id} has no --point, --box or --mask")
        groups.append(PromptGroup(object_id=value))


class _PointAction(_GroupAction):
    def apply(
        self, parser: argparse.ArgumentParser, groups: list[PromptGroup], value: tuple[float, float, int]
    ) -> None:
        if groups[-1].mask_path is not None:
            parser.error("--point beside --mask: a mask says everything about its object")
        groups[-1].points.append(value)


class _BoxAction(_GroupAction):
    def apply(
        self,
        parser: argparse.ArgumentParser,
        groups: list[PromptGroup],
        value: tuple[float, float, float, float],
    ) -> None:
        if groups[-1].mask_path is not None or groups[-1].box is not None:
            parser.error("--box: one per object, and none beside --mask; put --object ID before the next one")
        groups[-1].box = value


class _MaskAction(_GroupAction):
    def apply(self, parser: argparse.ArgumentParser, groups: list[PromptGroup], value: Path) -> None:
        if not groups[-1].is_empty:
            parser.error("--mask: one per object, alone; put --object ID before the next one")
        groups[-1].mask_path = value


class _AtAction(_GroupAction):
    def apply(self, parser: argparse.ArgumentParser, groups: list[PromptGroup], value: int) -> None:
        if value < 0:
            parser.error(f"--at {value}: expected a frame number from 0")
        groups[-1].frame_id = value
