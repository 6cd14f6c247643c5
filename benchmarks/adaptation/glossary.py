"""What the names of the methods mean, and how their rates were chosen."""

from benchmarks.adaptation.sections import bank_told

METHODS = {
    "head": "the linear head alone.",
    "LoRA": "PEFT's, alpha twice the rank. *LoRA from the bank*: of rank 8, its factors start at the members' mean.",
    "VeRA, PiSSA, UniLora": "PEFT's.",
    "random": "coefficients of rank 8 on 32 seeded random orthonormal directions a side (near to NOLA).",
    "paper": "EigenLoRAx ([arXiv:2502.04700](https://arxiv.org/abs/2502.04700)): principal components of the members' "
    "centred A and B, the means added, random coefficients at the start. *paper, mean left out*: the same components "
    "without the means, started at the base model.",
    "bank": "this library's 32 directions a side, started at the base model.",
    "gradient": "32 directions of the task's own gradient before training (`augment`); nothing of a bank.",
    "bank + gradient": "16 of each. *random + gradient* likewise.",
    "mean start": "coefficients start at the members' mean update instead of the base model. *Mean merged*: that mean "
    "is merged into the base model first, and no directions of the bank are used.",
    "core 22 x 22": "one square matrix between 22 of the bank's directions a side instead of two factors.",
}


def glossary() -> list[str]:
    """Paragraphs."""
    return [
        "## What is compared",
        f"The source adapters of the text tasks are LoRAs of rank 8, each from a random start of its own, trained "
        "on 640 examples for 120 steps: nine pairs of 20 Newsgroups' groups and sentiment in four of MultiEmo's "
        f"domains. {bank_told('encoder')} Tasks outside the bank are six others. Two of them, R8 (topics of news) "
        "and rotten-tomatoes (sentiment of reviews), are of a kind with some of the sources, and four are not.",
        "\n".join(f"- *{name}*: {meaning}" for name, meaning in METHODS.items()),
        "Every method has two learning rates, its own and its head's. They are chosen by the final validation loss on "
        "two tasks (rotten-tomatoes and intent, two of the six), with one seed: from three rates a factor of 3 apart, "
        "then from all neighbours of the best pair until it has none untried. Six tenths of the steps, 48 examples, "
        "the vision and the language model have searches of their own; all else takes the rates that the same method, "
        "or the nearest one, has with 320 examples. Test parts choose nothing. Each seed draws its three parts anew, "
        "so some texts of the first seed's validation parts, which chose the rates, are in other seeds' test parts, "
        "the same for all methods.",
    ]
