"""Any encoder, decoder or cross-encoder of transformers on PyTorch: the extra `torch`.

The files beside this one import torch and transformers at their top; this one waits until it is used.
"""

from importlib.util import find_spec

from quiver.backends import Backend
from quiver.config import Dtype
from quiver.errors import LoadError, MissingExtra
from quiver.models.catalogue import ModelSpec
from quiver.models.files import ModelFiles

DTYPES = ("float32", "float16", "bfloat16")


def load(files: ModelFiles, spec: ModelSpec, *, dtype: str, lanes: int = 0, device: str | None = None) -> Backend:
    """Load the model of a directory; `lanes` 0 means what pays on the device, `device` None the best of this machine.

    Raises `LoadError` and `MissingExtra`.
    """
    _need_packages()
    if dtype not in DTYPES:
        raise LoadError(
            f"torch computes in {', '.join(DTYPES)}, not in {dtype}: choose one of these, or another backend"
        )
    return _load(files, spec, dtype, lanes, device or best_device())


def has_gpu() -> bool:
    """Tell whether a graphics card can be used: there is one, and torch to use it with."""
    return _are_installed() and best_device() != "cpu"


def best_device() -> str:
    """Name the device that models run on where none is asked for."""
    _need_packages()
    import torch  # noqa: PLC0415  it is optional

    return "cuda" if torch.cuda.is_available() else "cpu"


def best_dtype() -> Dtype:
    """Name the arithmetic that suits the best device."""
    if best_device() == "cpu":
        return "float32"
    import torch  # noqa: PLC0415

    return "bfloat16" if torch.cuda.is_bf16_supported() else "float16"


def _need_packages() -> None:
    if not _are_installed():
        raise MissingExtra("torch", "the backend torch")


def _are_installed() -> bool:
    return all(map(find_spec, ("torch", "transformers")))


def _load(files: ModelFiles, spec: ModelSpec, dtype: str, lanes: int, device: str) -> Backend:
    from quiver.backends.pytorch import attention, heads  # noqa: PLC0415  they import torch
    from quiver.backends.pytorch.backend import TorchBackend  # noqa: PLC0415
    from quiver.backends.pytorch.checkpoint import quiet, read_model  # noqa: PLC0415
    from quiver.backends.pytorch.trunk import Trunk  # noqa: PLC0415

    attention.register()
    with quiet():
        model = read_model(files, spec, dtype).to(device)
        module, tail = heads.split(model, files, spec, device)
        try:
            return TorchBackend(Trunk(module, device), tail, lanes=lanes, max_tokens=spec.max_tokens)
        except Exception as error:  # the model may raise anything when it is tried
            raise LoadError(f"{files.root} is loaded but cannot compute: {error}") from error
