"""The command ``adapterbank``: one public call per command. Importing it does not import torch."""

from adapterbank.cli import changing, demo, fitting, looking, masks, serving, training
from adapterbank.cli.app import app, main
from adapterbank.cli.shira import shira

__all__ = ["app", "main"]

# in the order in which help lists them
for _command in (
    demo.demo,
    fitting.fit,
    looking.info,
    looking.diagnose,
    looking.verify,
    fitting.add,
    changing.remove,
    changing.rename,
    fitting.absorb,
    changing.export,
    training.train,
    serving.plan,
):
    app.command()(_command)
shira.command("mask")(masks.show)
app.add_typer(shira, name="shira")
