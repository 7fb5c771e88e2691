"""The model in the formats that some peers need, each made once from the same files by its usual tool."""

import shutil
import sys
from pathlib import Path
from typing import Any

DESCRIPTIONS = ("config.json", "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json", "vocab.txt")
INPUTS = ("input_ids", "attention_mask", "token_type_ids")
OUTPUT = "last_hidden_state"
OPSET = 14
"""What optimum exports BERT with; newer ones give ONNX Runtime the same fused graph."""


def export_onnx(model: Path, folder: Path) -> None:
    """Write model.onnx with padded inputs, as optimum does, and the files beside it."""
    import torch  # noqa: PLC0415  only in the environment that has it
    from transformers import AutoModel  # noqa: PLC0415

    class Hidden(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            # What ONNX Runtime, and Infinity's optimiser, can fuse:
            self.encoder = AutoModel.from_pretrained(model, attn_implementation="eager")

        def forward(self, ids: Any, mask: Any, type_ids: Any) -> Any:
            return self.encoder(input_ids=ids, attention_mask=mask, token_type_ids=type_ids).last_hidden_state

    ones = torch.ones(2, 7, dtype=torch.long)
    axes = {name: {0: "batch", 1: "sequence"} for name in (*INPUTS, OUTPUT)}
    options = {"input_names": INPUTS, "output_names": (OUTPUT,), "dynamic_axes": axes, "opset_version": OPSET}
    given = (ones, ones, torch.zeros_like(ones))
    torch.onnx.export(Hidden().eval(), given, folder / "model.onnx", dynamo=False, **options)
    for name in DESCRIPTIONS:
        shutil.copy(model / name, folder)


def export_ct2(model: Path, folder: Path) -> None:
    """Convert with CTranslate2's own converter."""
    from ctranslate2.converters import TransformersConverter  # noqa: PLC0415  only in the environment that has it

    TransformersConverter(str(model), copy_files=["tokenizer.json"]).convert(str(folder), force=True)


if __name__ == "__main__":
    what, model, folder = sys.argv[1:]
    {"onnx": export_onnx, "ct2": export_ct2}[what](Path(model), Path(folder))
