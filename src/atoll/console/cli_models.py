"""Commands about models: the registry, deployments, predictions."""

from pathlib import Path
from typing import Annotated

import typer

from atoll.console.terminal import Json, console, of, rest, say

PANEL = "Models"
Reference = Annotated[str, typer.Argument(metavar="MODEL", help="name@version or name@alias.", show_default=False)]
DeploymentName = Annotated[str, typer.Argument(metavar="NAME", help="The deployment's name.", show_default=False)]

app = typer.Typer()
models = typer.Typer(invoke_without_command=True)
app.add_typer(models, name="models", rich_help_panel=PANEL)


@models.callback()
def list_models(context: typer.Context, as_json: Json = False) -> None:
    """List the models; `atoll models show MODEL` walks one's lineage.

    Example: atoll models
    """
    if context.invoked_subcommand is not None:
        return
    from atoll.console import show

    with of(context).hub() as hub:
        found, aliases = hub.models(), hub.aliases()
    of(context).emit({"models": found, "aliases": aliases}, show.models(found, aliases), as_json)


@models.command("show")
def show_model(context: typer.Context, reference: Reference, as_json: Json = False) -> None:
    """Show where a model came from: model, run, plan, job, code, data, decisions.

    Example: atoll models show heart@1
    """
    from atoll.console import show

    with of(context).hub() as hub:
        tree = hub.lineage(reference)
    of(context).emit(tree, show.lineage(tree), as_json)


@models.command("export")
def export_model(
    context: typer.Context,
    reference: Reference,
    out: Annotated[
        Path | None, typer.Option("--out", help="A folder to make; by default NAME-VERSION here.", metavar="DIR")
    ] = None,
    as_json: Json = False,
) -> None:
    """Take a model out: safetensors weights, document, lineage, code and checksums in a folder, if the policy allows.

    Example: atoll models export heart@1 --out heart
    """
    from atoll.console.exports import export
    from atoll.console.show import text

    with of(context).hub() as hub:
        model = hub.model(reference)
        folder = out or Path(f"{model.name}-{model.version}")
        with console(stderr=True).status(f"{model.reference}") as status:
            export(hub, model.reference, folder, lambda done, size: status.update(f"{done:,} of {size:,} bytes"))
    of(context).emit({"model": model, "folder": str(folder)}, text(f"{model.reference} is in {folder}"), as_json)


@models.command("erase")
def erase_model(
    context: typer.Context,
    reference: Annotated[str, typer.Argument(metavar="MODEL", help="name@version.", show_default=False)],
    yes: Annotated[bool, typer.Option("--yes", help="Ask nothing.")] = False,
    as_json: Json = False,
) -> None:
    """Remove a version's weights and aliases for good, if the policy allows; its lineage stays in the record.

    Example: atoll models erase heart@1
    """
    from atoll.console.show import text
    from atoll.errors import Invalid

    with of(context).hub() as hub:
        model = hub.model(reference)
        if model.reference != reference:
            raise Invalid(f"model: {reference!r} means {model.reference} now; name the version to erase")
        names = [name for name, version in hub.aliases().get(model.name, {}).items() if version == model.version]
        called = f" ({', '.join(names)})" if names else ""
        if not yes and as_json:
            raise Invalid(f"--json: asks nobody; add --yes to remove {model.reference}{called} for good")
        if not (yes or typer.confirm(f"Remove {model.reference}{called} for good?", err=True)):
            raise typer.Exit(1)
        hub.erase(model.reference)
    of(context).emit({"erased": model.reference, "aliases": names}, text(f"{model.reference} is erased"), as_json)


@app.command(rich_help_panel=PANEL)
def promote(
    context: typer.Context,
    reference: Reference,
    alias: Annotated[str, typer.Argument(metavar="ALIAS", help="For example: production.", show_default=False)],
    as_json: Json = False,
) -> None:
    """Give a version an alias, if the policy allows.

    Example: atoll promote heart@1 production
    """
    from atoll.console import show

    with of(context).hub() as hub:
        model = hub.promote(reference, alias)
        aliases = hub.aliases()
    of(context).emit(model, show.models([model], aliases), as_json)


@app.command(rich_help_panel=PANEL)
def deploy(
    context: typer.Context,
    reference: Reference,
    name: Annotated[str | None, typer.Option(help="The deployment's name; by default the model's.")] = None,
    port: Annotated[int, typer.Option(help="The port on 127.0.0.1; 0 takes a free one.", min=0, max=65535)] = 0,
    as_json: Json = False,
) -> None:
    """Let a model answer over HTTP. With no hub running, this command is the server until Ctrl-C.

    Example: atoll deploy heart@production --port 8100
    """
    from atoll.console import show
    from atoll.spec.document import parse
    from atoll.spec.model import Deployment

    with of(context).hub() as hub:
        model = hub.model(reference)
        asked = {"name": name or model.name, "model": model.reference, "port": port}
        view = hub.deploy(parse(Deployment, asked, "deploy"))
        of(context).emit(view, show.deployments([view]), as_json)
        if hub.address.embedded:
            say(f"{view.model} answers at {view.url} until Ctrl-C.")
            rest()
            hub.undeploy(view.name)


@app.command(rich_help_panel=PANEL)
def undeploy(context: typer.Context, name: DeploymentName) -> None:
    """Stop a deployment.

    Example: atoll undeploy heart
    """
    with of(context).hub() as hub:
        hub.undeploy(name)
    say(f"{name} is stopped.")


@app.command(rich_help_panel=PANEL)
def deployments(context: typer.Context, as_json: Json = False) -> None:
    """List where models answer.

    Example: atoll deployments
    """
    from atoll.console import show

    with of(context).hub() as hub:
        found = hub.deployments()
    of(context).emit(found, show.deployments(found), as_json)


@app.command(rich_help_panel=PANEL)
def predict(
    context: typer.Context,
    name: DeploymentName,
    rows: Annotated[
        str | None, typer.Option(help="A file of rows (.csv, .json, .jsonl), or - for JSON on standard input.")
    ] = None,
    row: Annotated[list[str] | None, typer.Option(help="One row as JSON; may be given again.")] = None,
    as_json: Json = False,
) -> None:
    """Ask a deployment about rows.

    Example: atoll predict heart --row '{"age": 63, "chol": 233}'
    """
    from atoll.console import show
    from atoll.console.rows import read_rows

    asked = read_rows(rows, row or [])
    with of(context).hub() as hub:
        answer = hub.predict(name, asked)
    of(context).emit(answer, show.prediction(answer), as_json)
