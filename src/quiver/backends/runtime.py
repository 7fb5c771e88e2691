"""Which ONNX Runtime is installed."""

from pathlib import Path

from quiver.capacity import Runtime

MIN_VERSION = "1.24"
"""As pyproject.toml asks for it."""


def onnx_runtime() -> Runtime:
    """Say which one it is, and where it lies; imports it."""
    import onnxruntime as ort  # noqa: PLC0415  slow, and most processes never ask

    is_supported = _numbers(ort.__version__) >= _numbers(MIN_VERSION)
    path = Path(ort.__file__).parent
    return Runtime(ort.__version__, path, MIN_VERSION, is_supported, tuple(ort.get_available_providers()))


def _numbers(version: str) -> list[int]:
    """`1.24.0rc1` -> [1, 24]: what tells whether it is new enough."""
    return [int(part) for part in version.split(".")[:2]]
