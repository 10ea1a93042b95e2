"""Commands about sites, their data and their policies, the hub itself, the record, and the dashboard."""

from pathlib import Path
from typing import Annotated

import typer

from atoll.console.terminal import Json, of, rest, say, secret

PANEL, OTHER = "Sites and data", "Other"
SiteName = Annotated[str, typer.Argument(metavar="SITE", help="The site's name.", show_default=False)]

app = typer.Typer()
site = typer.Typer(no_args_is_help=True, help="Make sites and invite them.")
data = typer.Typer(no_args_is_help=True, help="Register datasets at a site and list them.")
hub_app = typer.Typer(no_args_is_help=True, help="Run the coordinator.")
for group, name, panel in (
    (site, "site", PANEL),
    (data, "data", PANEL),
    (hub_app, "hub", PANEL),
):
    app.add_typer(group, name=name, rich_help_panel=panel)


# --- sites and data -------------------------------------------------------------------------------------------------


@app.command(rich_help_panel=PANEL)
def sites(context: typer.Context, as_json: Json = False) -> None:
    """List the sites and relays, whether they are connected, and behind which relay a site is.

    Example: atoll sites
    """
    from atoll.console import show

    with of(context).hub() as hub:
        found = hub.sites()
    of(context).emit(found, show.sites(found), as_json)


@site.command("add")
def site_add(
    context: typer.Context,
    name: SiteName,
    owner: Annotated[str, typer.Option(help="Who owns it.")] = "me",
    region: Annotated[str, typer.Option(help="Where it is.")] = "here",
    policy_file: Annotated[
        Path | None, typer.Option("--policy", help="The owner's rules (Cedar); by default strict ones.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Make a site in this home: its document and its owner's policy.

    Example: atoll site add zurich --owner "Zurich hospital" --region ch --policy zurich.cedar
    """
    from atoll.console.document import read_text
    from atoll.console.show import text
    from atoll.policy.defaults import SITE_POLICY
    from atoll.runtime.site import create
    from atoll.spec.document import parse
    from atoll.spec.fleet import Site

    asked = parse(Site, {"name": name, "owner": owner, "region": region}, "site add")
    folder = of(context).home / "sites" / asked.name
    create(folder, asked, read_text(policy_file) if policy_file else SITE_POLICY)
    of(context).emit(asked, text(f"Site {name} is in {folder}; its rules are in policy.cedar there."), as_json)


@site.command("invite")
def site_invite(
    context: typer.Context,
    name: SiteName,
    hours: Annotated[float, typer.Option(help="How long the token is good.", min=0.01, max=720)] = 24.0,
    relay: Annotated[
        str, typer.Option(metavar="HOST:PORT", help="Invite it as a relay, which other sites dial there.")
    ] = "",
    behind: Annotated[
        str | None, typer.Option(metavar="RELAY", help="Invite it to dial this relay in the hub's place.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Print a token with which one site may join, once; give it to the site's owner and to nobody else.

    The owner runs `atoll join` there and pastes it: as a word of the command any user of that machine could read it.
    For a relay it is `atoll relay start`.

    Example: atoll site invite zurich --hours 2 --behind alps
    """
    from atoll.console.show import text

    with of(context).hub() as hub:
        token = hub.invite(name, hours, relay, behind)
    of(context).emit({"site": name, "token": token}, text(token), as_json)
    command = f"atoll relay start --port {relay.rpartition(':')[2]}" if relay else "atoll join"
    say(f"For the owner of {name}, once, within {hours:g} hours: run `{command}` there and paste this token.")


@site.command("revoke")
def site_revoke(context: typer.Context, name: SiteName, as_json: Json = False) -> None:
    """Shut a site out at once: its session ends and its certificate is good for nothing any more.

    It comes back only by another invitation, with another key.

    Example: atoll site revoke zurich
    """
    from atoll.console.show import text

    with of(context).hub() as hub:
        hub.revoke(name)
    of(context).emit({"site": name, "revoked": True}, text(f"{name} is shut out."), as_json)


@site.command("release")
def site_release(context: typer.Context, name: SiteName, as_json: Json = False) -> None:
    """Let a site out of quarantine, in which it is given no work; `atoll sites` says why it is in it.

    A site gets there by three answers in a row that could not be taken. Find out first what is wrong with it.

    Example: atoll site release zurich
    """
    from atoll.console.show import text

    with of(context).hub() as hub:
        hub.release(name)
    of(context).emit({"site": name, "released": True}, text(f"{name} is given work again."), as_json)


@app.command(rich_help_panel=PANEL)
def join(
    context: typer.Context,
    token: Annotated[
        str | None,
        typer.Argument(
            metavar="[TOKEN]",
            help="From `atoll site invite`; - reads it from standard input, nothing asks for it.",
            show_default=False,
        ),
    ] = None,
    at: Annotated[
        str | None, typer.Option("--site", help="Which of this home's sites; by default its only one.")
    ] = None,
) -> None:
    """Join a hub as a site, and work for it until Ctrl-C. The site dials out; no port opens here.

    Asked for, the token is not shown, and no other user of this machine can read it among the processes.

    Example: atoll join --home /srv/atoll
    """
    from atoll.console.document import site_folder
    from atoll.console.logs import trim_site

    folder = site_folder(of(context).home, at)
    given = secret("Token", "token") if token in (None, "-") else token
    from atoll.runtime.site import join as join_hub

    try:
        trim_site(folder)
        join_hub(folder, given)
    except KeyboardInterrupt:
        say("The site has left.")


@data.command("add")
def data_add(
    context: typer.Context,
    name: Annotated[str, typer.Argument(metavar="NAME", help="What jobs call the dataset.", show_default=False)],
    path: Annotated[Path, typer.Argument(metavar="PATH", help="A Parquet, CSV or Arrow file.", show_default=False)],
    at: Annotated[str | None, typer.Option("--site", help="The site; by default this home's only one.")] = None,
    purpose: Annotated[list[str] | None, typer.Option(help="A purpose it is granted for; may be given again.")] = None,
    min_group: Annotated[int, typer.Option(help="Groups of fewer rows are held back from queries.", min=0)] = 10,
    as_json: Json = False,
) -> None:
    """Register a dataset at a site of this home. Its rows stay where they are.

    `atoll data grant` gives a purpose an end, and `atoll data require` says what updates must pass through.

    Example: atoll data add heart zurich.parquet --site zurich --purpose cardiology-research
    """
    from atoll.console import show
    from atoll.console.document import site_folder
    from atoll.data.catalogue import Catalogue
    from atoll.spec.fleet import Fleet, Site

    folder = site_folder(of(context).home, at, laptop=True)
    dataset = Catalogue(folder).add(name, path, tuple(purpose or ()), min_group)
    of(context).emit(dataset, show.datasets(Fleet(sites=(Site(name=folder.name, datasets=(dataset,)),))), as_json)


@data.command("remove")
def data_remove(
    context: typer.Context,
    name: Annotated[str, typer.Argument(metavar="NAME", help="What jobs call the dataset.", show_default=False)],
    at: Annotated[str | None, typer.Option("--site", help="The site; by default this home's only one.")] = None,
    as_json: Json = False,
) -> None:
    """Take a dataset off a site's list; its file stays where it is.

    Example: atoll data remove heart --site zurich
    """
    from atoll.console.document import site_folder
    from atoll.console.show import text
    from atoll.data.catalogue import Catalogue

    folder = site_folder(of(context).home, at, laptop=True)
    Catalogue(folder).remove(name)
    of(context).emit({"site": folder.name, "removed": name}, text(f"{name} is off {folder.name}'s list."), as_json)


@data.command("list")
def data_list(context: typer.Context, as_json: Json = False) -> None:
    """List datasets: of every site while a hub runs, else of this home's own sites.

    Example: atoll data list
    """
    from atoll.console import show
    from atoll.console.client import Client
    from atoll.console.document import local_fleet
    from atoll.console.host import find

    home = of(context).home
    running = find(home, of(context).token())
    if running is None:
        fleet = local_fleet(home)
    else:
        with Client(running) as hub:
            fleet = hub.fleet()
    told = [{"site": place.name, **item.model_dump(mode="json")} for place in fleet.sites for item in place.datasets]
    of(context).emit(told, show.datasets(fleet), as_json)


# --- the hub and its page -------------------------------------------------------------------------------------------


@hub_app.command("init")
def hub_init(
    context: typer.Context,
    host: Annotated[
        str, typer.Option(help="The address that the sites' port is bound to; 0.0.0.0 for every one.")
    ] = "127.0.0.1",
    site_port: Annotated[
        int, typer.Option(help="The port that sites dial; 0 takes a free one and keeps it.", min=0, max=65535)
    ] = 0,
    name: Annotated[
        list[str] | None,
        typer.Option("--name", help="A DNS name or address by which sites dial; may be repeated, the first is told."),
    ] = None,
    region: Annotated[str, typer.Option(help="Where it is; sites' rules and datasets' terms may ask.")] = "here",
    as_json: Json = False,
) -> None:
    """Make this home's hub ready for sites elsewhere: its CA, and where they reach it.

    A hub that starts without this makes its CA by itself and is reached from this machine only. The CA is kept when
    there is one, for sites know the hub by it; whoever can read hub/ca can pose as the hub.

    Example: atoll hub init --host 0.0.0.0 --site-port 7443 --name hub.example.org
    """
    from atoll.console.show import text
    from atoll.runtime.membership import initialise
    from atoll.spec.document import parse
    from atoll.spec.fleet import Reach

    reach = parse(Reach, {"host": host, "port": site_port, "names": name or [], "region": region}, "hub init")
    folder = of(context).home / "hub"
    initialise(folder, reach)
    port = site_port or "a free port, the same each time"
    words = f"The hub in {folder} takes sites at {host}, {port}. Start it with `atoll hub start`."
    of(context).emit(reach, text(words), as_json)


@hub_app.command("start")
def hub_start(
    context: typer.Context,
    port: Annotated[int, typer.Option(help="The API's port on 127.0.0.1; 0 takes a free one.", min=0, max=65535)] = 0,
    site_port: Annotated[int, typer.Option(help="The port that sites dial; 0 keeps the last.", min=0, max=65535)] = 0,
) -> None:
    """Run the hub and this home's sites in the foreground, until Ctrl-C.

    Example: atoll hub start --port 8000
    """
    from atoll.console.client import Client
    from atoll.console.host import attach
    from atoll.errors import Unavailable

    home = of(context).home
    address = attach(home, sites=True, port=port, site_port=site_port)
    if not address.embedded:
        raise Unavailable(f"hub: one runs for {home} already, at {address.url}; use it, or give another --home")
    with Client(address) as hub:
        say(f"The hub of {home} answers at {address.url} until Ctrl-C; `atoll ui` opens its page.")
        rest(hub)


@app.command(rich_help_panel=OTHER)
def ui(
    context: typer.Context,
    open_it: Annotated[bool, typer.Option("--open", help="Open it in a browser.")] = False,
    as_json: Json = False,
) -> None:
    """Print a link to the dashboard, good for one login within two minutes.

    Example: atoll ui --open
    """
    import webbrowser

    from atoll.console.show import text

    with of(context).hub(sites=True) as hub:
        url = hub.login_url()
        of(context).emit({"url": url}, text(url), as_json)
        if open_it and not webbrowser.open(url):
            say("No browser could be opened; open the link yourself.")
        if hub.address.embedded:
            say("The hub runs in this command until Ctrl-C.")
            rest(hub)


@app.command(rich_help_panel=OTHER)
def schema(
    kind: Annotated[str | None, typer.Argument(metavar="KIND", help="For example: train; by default all.")] = None,
) -> None:
    """Print the JSON Schema of the documents, for editors and checks.

    Example: atoll schema train
    """
    import json
    import sys

    from atoll.console.document import schemas

    sys.stdout.write(json.dumps(schemas(kind), indent=2) + "\n")
