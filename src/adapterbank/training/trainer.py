"""A model and its data in transformers' Trainer."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import (
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)

from adapterbank.training.examples import IGNORED
from adapterbank.training.method import Method, Settings, Tell
from adapterbank.training.run_directory import Scores


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainingRun:
    """A model and its data, ready to train."""

    method: Method
    model: Any
    processor: Any
    train: Any
    evaluate: Any
    tell: Tell

    @property
    def settings(self) -> Settings:
        """Of the method."""
        return self.method.settings

    def untrained(self, place: Path) -> Scores:
        """Scores of the base model with its fresh head; then the method looks at the task."""
        trainer = self._trainer(self._arguments(place), (None, None))
        self.tell("evaluate the base model", 0, 1)
        with self.model.disable_adapter():  # the coefficients may start elsewhere
            found = trainer.evaluate()
        self.tell("evaluate the base model", 1, 1)
        if self.method.looking:
            seeded = torch.Generator().manual_seed(self.settings.seed)
            loader: Any = DataLoader(
                self.train, self.settings.batch, shuffle=True, generator=seeded, collate_fn=self._collator()
            )
            self.tell(self.method.looking, 0, 1)
            batches = ({name: value.to(trainer.args.device) for name, value in batch.items()} for batch in loader)
            self.method.look(self.model, batches, self.tell)
            self.tell(self.method.looking, 1, 1)
        return Scores(loss=found["eval_loss"], accuracy=found["eval_accuracy"])

    def trained(self, place: Path, checkpoint: Path | None) -> list[Scores]:
        """Train to the end, from a checkpoint if there is one; scores of every epoch."""
        arguments = self._arguments(place)
        self.model.to(arguments.device)  # before the optimiser sees it
        optimizer = torch.optim.AdamW(self.method.optimizer_groups(self.model))
        steps = self.settings.epochs * -(-len(self.train) // arguments.train_batch_size)
        warmup = max(1, steps // 10)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))
        )
        trainer = self._trainer(arguments, (optimizer, schedule))
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        return [
            Scores(loss=entry["eval_loss"], accuracy=entry["eval_accuracy"])
            for entry in trainer.state.log_history
            if "eval_accuracy" in entry
        ]

    def _arguments(self, place: Path) -> TrainingArguments:
        return TrainingArguments(
            output_dir=str(place),
            num_train_epochs=self.settings.epochs,
            per_device_train_batch_size=self.settings.batch,
            per_device_eval_batch_size=self.settings.batch,
            eval_strategy="epoch",
            save_strategy="epoch",
            save_total_limit=2,  # while one is written the other is whole
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
            label_names=["labels"],
            seed=self.settings.seed,
            dataloader_pin_memory=torch.cuda.is_available(),
        )

    def _trainer(self, arguments: TrainingArguments, optimizers: tuple[Any, Any]) -> Any:
        trainer = _Trainer(
            model=self.model,
            args=arguments,
            data_collator=self._collator(),
            train_dataset=self.train,
            eval_dataset=self.evaluate,
            compute_metrics=lambda found: _accuracy(found, is_shifted=self.settings.task == "causal-lm"),
            preprocess_logits_for_metrics=_guesses,
            callbacks=[Telling(self.tell)],
            optimizers=optimizers,
        )
        trainer.remove_callback(PrinterCallback)
        return trainer

    def _collator(self) -> Any:
        if self.settings.task == "image-cls":
            return default_data_collator
        if self.settings.task == "causal-lm":
            return DataCollatorForSeq2Seq(self.processor, label_pad_token_id=IGNORED)
        return DataCollatorWithPadding(self.processor)


class _Trainer(Trainer):
    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        # PEFT would ask the hub about the base model, to find out whether its vocabulary has grown
        save = self.model.save_pretrained
        self.model.save_pretrained = lambda *a, **kw: save(*a, **kw, save_embedding_layers=False)
        try:
            super()._save(output_dir, state_dict)
        finally:
            del self.model.save_pretrained


class Telling(TrainerCallback):
    """Passes on how far the training is."""

    def __init__(self, tell: Tell) -> None:
        """``tell``: told after every step."""
        self.tell = tell

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """See ``TrainerCallback``."""
        self.tell("train", state.global_step, state.max_steps)


def _guesses(logits: Any, labels: Any) -> Any:
    # all logits of an evaluation would be the size of the vocabulary times that of the text
    return (logits[0] if isinstance(logits, tuple) else logits).argmax(-1)


def _accuracy(found: Any, *, is_shifted: bool) -> dict[str, float]:
    guesses, labels = found.predictions, found.label_ids
    if is_shifted:  # the logits of a token are about the next one
        guesses, labels = guesses[:, :-1], labels[:, 1:]
    asked = labels != IGNORED
    return {"accuracy": float((guesses == labels)[asked].mean()) if asked.any() else 0.0}
