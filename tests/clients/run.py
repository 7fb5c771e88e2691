"""Start one server, and run the tests of each environment's clients against it: `run.py vendors infinity …`.

It serves the embedded model, and a tiny random reranker and classifier, and reads OpenAI's token ids. Only this file knows
Quiver: the clients are given a URL, and have an environment that it is not installed in.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from safetensors.numpy import load_file, save_file

import checkpoints
import checkpoints_decoders
from server_process import serving

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
EMBEDDER = "all-MiniLM-L6-v2"
TABLES = ".venv-clients-llama-index/lib/*/site-packages/llama_index/core/_static/tiktoken_cache"
"""OpenAI's tokenizers as LlamaIndex carries them: tiktoken would fetch them from the internet."""


def make_classifier(folder: Path, *, labels: int) -> Path:
    """Write a random BERT that scores a text by so many labels: with one, it is a reranker."""
    made = checkpoints_decoders.make(folder, "bert", head="classifier")
    names = {str(i): f"LABEL_{i}" for i in range(labels)}
    facts = {"architectures": ["BertForSequenceClassification"], "id2label": names}
    checkpoints.write_json(folder / "config.json", made.config | facts)
    tensors = load_file(folder / "model.safetensors")
    head = {name: array[:labels].copy() for name, array in tensors.items() if name.startswith("classifier.")}
    save_file(tensors | head, folder / "model.safetensors", metadata={"format": "pt"})
    checkpoints.write_tokenizer(folder, checkpoints_decoders.family("bert"))
    return folder


def passes(environment: str, url: str, tables: Path) -> bool:
    """Run the tests of one environment's clients."""
    print(f"{environment}:", flush=True)  # noqa: T201
    python = ROOT / f".venv-clients-{environment}" / "bin" / "python"
    tests = HERE / f"test_{environment.replace('-', '_')}.py"
    command = [python, "-m", "pytest", "-q", "-c", HERE / "pytest.ini", tests]
    ours = {"CLIENTS_URL": url, "NO_PROXY": "127.0.0.1", "PYTHONPATH": "", "TIKTOKEN_CACHE_DIR": str(tables)}
    env = os.environ | ours
    return subprocess.run(command, env=env, check=False).returncode == 0  # noqa: S603  our own command


def main(environments: list[str]) -> int:
    """Return the exit code: 0 if the tests of all environments pass."""
    (tables,) = ROOT.glob(TABLES)
    with tempfile.TemporaryDirectory() as folder:
        reranker = make_classifier(Path(folder) / "reranker", labels=1)
        classifier = make_classifier(Path(folder) / "classifier", labels=3)
        models = [word for model in (EMBEDDER, reranker, classifier) for word in ("--model", str(model))]
        with serving(*models, "--openai-ids", "cl100k", "--cl100k-file", str(tables)) as server:
            url = server.ready_url()
            results = [passes(environment, url, tables) for environment in environments]
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
