"""What every `--plot` needs before anything is measured."""

from collections.abc import Sequence
from pathlib import Path

from trocar_engines.errors import TrocarError

INSTALL = "pip install 'matplotlib>=3.10,<4'"
FORMATS = (".png", ".pdf", ".svg")


def check_plot(path: Path, formats: Sequence[str] = FORMATS) -> None:
    """Refuse before hours of measuring what could not be drawn after them.

    Args:
        path: of the picture.
        formats: endings that it may have.

    Raises:
        TrocarError: matplotlib is absent, or the file cannot be written.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise TrocarError(f"--plot needs matplotlib, which is not installed: {INSTALL}") from None
    if path.suffix.lower() not in formats:
        raise TrocarError(f"--plot {path}: expected a file that ends in {', '.join(formats)}")
    if not path.parent.is_dir():
        raise TrocarError(f"--plot {path}: there is no folder {path.parent}")
