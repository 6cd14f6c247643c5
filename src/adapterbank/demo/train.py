"""Train one ordinary PEFT LoRA on one task, and measure the accuracy of any adapter on it."""

import hashlib
import json
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from adapterbank.demo.assets import MINILM, AssetError, cache_dir, place
from adapterbank.demo.data import Example, Task, load_task
from adapterbank.demo.models import MINILM_ID, load_classifier, load_tokenizer

Progress = Callable[[int, int], None]
"""Called with the steps done and the steps in total."""


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """Everything that decides how an adapter comes out: equal settings, same adapter, one cache entry."""

    task: str
    """One of ``adapterbank.demo.data.TASKS``."""
    init_seed: int = 0
    """Draws the random ``A``: adapters that share it start in the same subspace."""
    seed: int = 0
    """Draws the order of the examples and the base model's dropout."""
    r: int = 8
    alpha: int = 16
    # "output.dense" is also attention.output.dense, and pooler.dense matches none of these
    target_modules: tuple[str, ...] = ("query", "key", "value", "intermediate.dense", "output.dense")
    examples: int = 640
    test_examples: int = 400
    max_tokens: int = 64
    epochs: int = 3
    batch: int = 16
    lr: float = 1e-3
    head_lr: float = 1e-2
    """Of the task head, which starts from nothing: at the LoRA's rate eight classes stay unlearned (.61, not .91)."""

    def key(self) -> str:
        """Hash of the settings and of the base model's file."""
        text = json.dumps({"base": MINILM.sha256, **asdict(self)}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


def train_adapter(settings: TrainSettings, out: Path | None = None, *, progress: Progress | None = None) -> Path:
    """PEFT directory of an adapter trained with ``settings``, from the cache if it is there.

    Args:
        settings: What to train.
        out: Where to put the adapter; by default a folder of the cache named after the settings. It appears when the
            adapter is complete. One that is there already is returned if it was trained with the same settings.
        progress: Told about each step.

    Raises:
        AssetError: If the base model or the data can't be had, or ``out`` holds something else.
    """

    def make(task: Task, tokenizer: Any) -> tuple[Any, None]:
        return peft_model(settings, len(task.labels)), None

    return train_model(make, settings, asdict(settings), settings.key(), out, progress=progress)


def train_model(
    make: Callable[[Task, Any], tuple[Any, list[dict[str, Any]] | None]],
    settings: TrainSettings,
    recipe: dict[str, Any],
    key: str,
    out: Path | None = None,
    *,
    progress: Progress | None = None,
) -> Path:
    """Train the model that ``make(task, tokenizer)`` returns, or find it in the cache.

    Args:
        make: Gives the model and the optimiser's groups, see :func:`fit`.
        settings: Of the task and the training.
        recipe: All that decides how it comes out, as ``meta.json`` is to show it.
        key: Hash of the recipe.
        out: As in :func:`train_adapter`; the rest too.
        progress: Told about each step.

    Raises:
        AssetError: If the base model or the data can't be had, or ``out`` holds something else.
    """
    out = out or cache_dir() / "adapters" / f"{settings.task}-{key}"
    if out.exists():
        if (out / "meta.json").exists() and read_meta(out)["key"] == key:
            return out
        raise AssetError(f"{out} exists and isn't the adapter of {settings}; remove it or name another folder")
    task = load_task(settings.task, train=settings.examples, test=settings.test_examples)
    tokenizer = load_tokenizer()
    start = time.process_time()
    model, groups = make(task, tokenizer)
    fit(model, tokenizer, task, settings, groups, progress=progress)
    meta = {
        "key": key,
        "settings": recipe,
        "labels": task.labels,
        "train_examples": len(task.train),
        "test_examples": len(task.test),
        "accuracy": evaluate(model, tokenizer, task.test, max_tokens=settings.max_tokens),
        "accuracy_majority": task.majority,
        "cpu_seconds": round(time.process_time() - start, 1),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".") as scratch:
        folder = Path(scratch) / out.name
        folder.mkdir()
        if hasattr(model, "peft_config"):
            # False: the vocabulary is untouched, and finding that out would ask the hub about the base model
            model.save_pretrained(folder, save_embedding_layers=False)
            (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty model card, which names a folder on our disk
        (folder / "meta.json").write_text(json.dumps(meta, indent=1) + "\n")
        place(folder, out)
    return out


def is_head(name: str) -> bool:
    """Whether a parameter or a stored tensor belongs to the task head."""
    return "classifier" in name


def read_meta(adapter: Path) -> dict[str, Any]:
    """What ``train_adapter`` wrote beside the adapter: its settings, accuracies and cost."""
    meta: dict[str, Any] = json.loads((adapter / "meta.json").read_text())
    return meta


def peft_model(settings: TrainSettings, labels: int) -> Any:
    """MiniLM with a fresh LoRA and a fresh head, ready to train."""
    from peft import LoraConfig, TaskType, get_peft_model

    torch.manual_seed(0)  # the head's start; one and the same for all tasks with as many labels
    base = load_classifier(labels)
    config = LoraConfig(
        task_type=TaskType.SEQ_CLS,
        r=settings.r,
        lora_alpha=settings.alpha,
        target_modules=list(settings.target_modules),
    )  # SEQ_CLS: the head is trained and saved as well
    torch.manual_seed(settings.init_seed)  # after the head, whose size would shift the draws of A
    model = get_peft_model(base, config)
    config.base_model_name_or_path = MINILM_ID  # PEFT puts the folder that the model was loaded from
    return model


def fit(
    model: Any,
    tokenizer: Any,
    task: Task,
    settings: TrainSettings,
    groups: list[dict[str, Any]] | None = None,
    *,
    progress: Progress | None = None,
) -> None:
    """Train whatever of ``model`` asks for gradients: AdamW, a linear warm-up over a tenth of the steps, then down.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        task: What to learn.
        settings: How.
        groups: AdamW's parameter groups; by default the head and the rest, at the rates in ``settings``.
        progress: Told about each step.
    """
    torch.manual_seed(settings.seed)
    order = random.Random(settings.seed)
    per_epoch = -(-len(task.train) // settings.batch)
    steps = settings.epochs * per_epoch
    warmup = max(1, steps // 10)
    optimizer = torch.optim.AdamW(groups or _groups(model, settings))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))
    )
    model.train()
    done = 0
    for _ in range(settings.epochs):
        examples = order.sample(task.train, len(task.train))
        for inputs, labels in batches(tokenizer, examples, settings.batch, settings.max_tokens):
            loss = F.cross_entropy(model(**inputs).logits, labels)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            done += 1
            if progress is not None:
                progress(done, steps)


def _groups(model: Any, settings: TrainSettings) -> list[dict[str, Any]]:
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    head, rest = ([p for name, p in trained if is_head(name) == wanted] for wanted in (True, False))
    return [{"params": rest, "lr": settings.lr}, {"params": head, "lr": settings.head_lr}]


@torch.no_grad()
def evaluate(model: Any, tokenizer: Any, examples: Sequence[Example], *, max_tokens: int = 64) -> float:
    """Share of ``examples`` that ``model`` labels right; any model with ``logits`` will do, also a ``PeftModel``."""
    model.eval()
    by_length = sorted(examples, key=lambda example: len(example[0]))  # little padding
    right = 0
    for inputs, labels in batches(tokenizer, by_length, 64, max_tokens):
        right += int((model(**inputs).logits.argmax(-1) == labels).sum())
    return right / len(examples)


def probe_accuracy(tokenizer: Any, task: Task, *, max_tokens: int = 64) -> float:
    """Test accuracy of logistic regression on the frozen model's mean-pooled output: what needs no adapter at all."""
    body = load_classifier(len(task.labels)).base_model.eval()
    train, train_labels = _features(body, tokenizer, task.train, max_tokens)
    test, test_labels = _features(body, tokenizer, task.test, max_tokens)
    head = torch.nn.Linear(train.shape[1], len(task.labels))
    torch.nn.init.zeros_(head.weight)
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        # as scikit-learn's C=1, with features of unit length scaled up to where that is a mild penalty
        value = F.cross_entropy(head(train), train_labels) + 0.5 * head.weight.square().sum() / len(train)
        value.backward()  # type: ignore[no-untyped-call]
        return value

    optimizer.step(loss)  # type: ignore[no-untyped-call]
    return float((head(test).argmax(-1) == test_labels).float().mean())


@torch.no_grad()
def _features(body: Any, tokenizer: Any, examples: Sequence[Example], max_tokens: int) -> tuple[Tensor, Tensor]:
    rows, targets = [], []
    for inputs, labels in batches(tokenizer, sorted(examples, key=lambda e: len(e[0])), 64, max_tokens):
        hidden = body(**inputs).last_hidden_state  # (b, t, d)
        mask = inputs["attention_mask"].unsqueeze(-1)
        mean = (hidden * mask).sum(1) / mask.sum(1)  # (b, d)
        rows.append(F.normalize(mean, dim=-1) * mean.shape[-1] ** 0.5 / 4)
        targets.append(labels)
    return torch.cat(rows), torch.cat(targets)


def batches(
    tokenizer: Any, examples: Sequence[Example], size: int, max_tokens: int
) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """Tokenised inputs and labels, ``size`` examples at a time, padded to the longest of them."""
    for start in range(0, len(examples), size):
        texts, labels = zip(*examples[start : start + size], strict=True)
        inputs = tokenizer(list(texts), padding=True, truncation=True, max_length=max_tokens, return_tensors="pt")
        yield dict(inputs), torch.tensor(labels)
