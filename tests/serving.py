"""Batches of tiny models, and what each row should give."""

import torch
from peft import PeftModel


def inputs_of(name, rows=4):
    ids = torch.randint(3, 50, (rows, 6), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids} | ({"decoder_input_ids": ids[:, :3]} if name == "t5" else {})


def logits(model, batch):
    with torch.no_grad():
        return model(**batch).logits


def exported(bank, name, make, folder):
    """Stock PEFT with the exported adapter."""
    bank.export(name, folder / name)
    return PeftModel.from_pretrained(make(), folder / name).eval()


def alike(found, expected, base, tolerance=1e-3):
    """As near as it matters: a thousandth of what the adapter changes."""
    effect = float((expected - base).abs().max())
    assert effect > 1e-5
    assert float((found - expected).abs().max()) < tolerance * effect + 1e-6


def check_rows_one_by_one(engine, rows):
    """A mixed batch is its rows one by one, and those of the base model are as they were, to the bit."""
    batch = inputs_of("llama", len(rows))
    base = logits(engine.model, batch)
    with engine.adapters(rows):
        mixed = logits(engine.model, batch)
    for i, name in enumerate(rows):
        with engine.adapters([name]):
            alone = logits(engine.model, {"input_ids": batch["input_ids"][i : i + 1]})
        torch.testing.assert_close(mixed[i], alone[0], rtol=1e-4, atol=1e-5)
        if name is None:
            assert torch.equal(mixed[i], base[i])
