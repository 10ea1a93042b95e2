"""The commands about pretrained models: folders that a site, or the hub, lists, and that jobs name by digest."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from atoll.console.terminal import Json, of

if TYPE_CHECKING:
    from atoll.data.catalogue import Catalogue

app = typer.Typer(no_args_is_help=True, help="List pretrained models, which jobs fine-tune where they lie.")
ListedName = Annotated[str, typer.Argument(metavar="NAME", help="What this list calls it.", show_default=False)]
At = Annotated[str | None, typer.Option("--site", help="The site; by default this home's only one.")]
AtHub = Annotated[bool, typer.Option("--hub", help="At the hub, where deployments answer, and not at a site.")]


@app.command("add")
def pretrained_add(
    context: typer.Context,
    name: ListedName,
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="With config.json and .safetensors files.", show_default=False)
    ],
    at: At = None,
    hub: AtHub = False,
    as_json: Json = False,
) -> None:
    """List a folder with a pretrained model, and print the digest by which jobs name it. Its files stay where they are.

    Whoever may run code at the site may use it there. The digest is the same wherever the same files lie.

    Example: atoll pretrained add gemma models/gemma --site zurich
    """
    from atoll.console.show import text

    made = _list(context, at, hub).add_pretrained(name, folder)
    of(context).emit({"name": made.name, "digest": made.digest}, text(made.digest), as_json)


@app.command("remove")
def pretrained_remove(
    context: typer.Context, name: ListedName, at: At = None, hub: AtHub = False, as_json: Json = False
) -> None:
    """Take a pretrained model off a list; its folder stays where it is.

    Example: atoll pretrained remove gemma --site zurich
    """
    from atoll.console.show import text

    _list(context, at, hub).remove_pretrained(name)
    of(context).emit({"removed": name}, text(f"{name} is off the list."), as_json)


@app.command("list")
def pretrained_list(context: typer.Context, at: At = None, hub: AtHub = False, as_json: Json = False) -> None:
    """List the pretrained models of a site of this home, or of its hub.

    Example: atoll pretrained list --site zurich
    """
    from atoll.console.show import table

    found = _list(context, at, hub).pretrained()
    rows = [(one.name, one.digest, len(one.files)) for one in found]
    told = [{"name": one.name, "digest": one.digest, "files": sorted(one.files)} for one in found]
    of(context).emit(told, table("Pretrained models", ("name", "digest", ">files"), rows), as_json)


def _list(context: typer.Context, at: str | None, hub: bool) -> "Catalogue":
    from atoll.console.document import site_folder
    from atoll.data.catalogue import Catalogue
    from atoll.errors import Invalid

    home = of(context).home
    if hub and at is not None:
        raise Invalid(f"--hub: excludes --site {at}; give one of them")
    return Catalogue(home / "hub" if hub else site_folder(home, at, laptop=True))
