"""Commands about whom a site believes: code that its owner reads, whose signatures count, and the other sites' keys."""

from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from atoll.console.cli_sites import site
from atoll.console.terminal import Json, of, say

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.text import Text

    from atoll.runtime.reviews import Reviews

app = typer.Typer()
At = Annotated[str | None, typer.Option("--site", help="The site; by default this home's only one.")]
Code = Annotated[str, typer.Argument(metavar="DIGEST", help="The code's digest, or how it begins.", show_default=False)]
_STYLES = {"+": "green", "-": "red", "@": "cyan"}


@site.command("code")
def site_code(context: typer.Context, at: At = None, as_json: Json = False) -> None:
    """List the code that waits for its owner to read it, and what was approved and rejected.

    Example: atoll site code --site zurich
    """
    from atoll.console import show

    with _reviews(context, at) as reviews:
        found = reviews.views()
    of(context).emit(found, show.code(found), as_json)


@site.command("approve")
def site_approve(
    context: typer.Context,
    digest: Code,
    yes: Annotated[bool, typer.Option("--yes", help="Approve it without being asked.")] = False,
    at: At = None,
    as_json: Json = False,
) -> None:
    """Show what is new in code since the last that was approved of its task, and let it run at this site.

    Nobody is asked with --json: it shows the same, and approves only together with --yes.

    Example: atoll site approve sha256:9c1f
    """
    from atoll.console.changed import cautions, changes
    from atoll.console.show import text
    from atoll.console.terminal import console
    from atoll.spec.model import Bundle

    with _reviews(context, at) as reviews:
        code = reviews.named(digest)
        before, bundle = reviews.before(code), reviews.text(code)
        lines = list(changes(before[1] if before is not None else Bundle(files={}), bundle))
        told = {"since": before[0] if before is not None else None, "cautions": cautions(bundle), "diff": lines}
        if not as_json:
            since = f"since {before[0]}" if before is not None else "all of it: none of its task was approved before"
            say(f"{code}, {since}:")
            for line in lines:
                console().print(_coloured(line), soft_wrap=True)
            for words in cautions(bundle):
                console().print(text(f"CAUTION: {words}", "bold red"), soft_wrap=True)
        if yes or (not as_json and typer.confirm("Let it run here?", err=True)):
            told, words = {**reviews.review(code, True, _user()).model_dump(), **told}, "may run here."
        else:
            told, words = {"code": code, "approved": False, **told}, "does not run here until you approve it."
    of(context).emit(told, text(f"{code} {words}"), as_json)


@site.command("reject")
def site_reject(context: typer.Context, digest: Code, at: At = None, as_json: Json = False) -> None:
    """Let code run at this site no more, or never; where rules ask for approval it is refused.

    Example: atoll site reject sha256:9c1f
    """
    from atoll.console.show import text

    with _reviews(context, at) as reviews:
        said = reviews.review(reviews.named(digest), False, _user())
    of(context).emit(said, text(f"{said.code} does not run here."), as_json)


@site.command("trust")
def site_trust(
    context: typer.Context,
    key: Annotated[str, typer.Argument(metavar="KEY", help="As `atoll key` prints it.", show_default=False)],
    name: Annotated[str, typer.Option(help="By what name this site's rules know its user.")],
    withdraw: Annotated[bool, typer.Option("--withdraw", help="Trust it no more.")] = False,
    at: At = None,
    as_json: Json = False,
) -> None:
    """Trust a user's key: this site's rules see the name in context.signer of code that the key signed.

    Ask the user for the key, not the hub.

    Example: atoll site trust atoll/ada/41a0...+2c9e...+AU8k... --name ada
    """
    from atoll.console.show import text

    with _reviews(context, at) as reviews:
        said = reviews.trust(key, name, not withdraw, _user())
    words = f"Code that {name} signs is {'known' if said.trusted else 'no longer known'} here as {name}'s."
    of(context).emit(said, text(words), as_json)


@site.command("peers")
def site_peers(context: typer.Context, at: At = None, as_json: Json = False) -> None:
    """List this site's fingerprint and those of the others that it met in secure sums, and whether they are confirmed.

    Example: atoll site peers --site zurich
    """
    from atoll.console.document import site_folder
    from atoll.console.show import table
    from atoll.journal import Journal
    from atoll.runtime.peers import Peer, Peers

    folder = site_folder(of(context).home, at)
    with Journal(folder / "journal.db", folder.name) as journal:
        own = Peer(str(journal.signer.public), "confirmed")
    known = Peers(folder).known()
    rows = [(folder.name, own.fingerprint, "this site")]
    rows += [(name, peer.fingerprint or "not yet seen", peer.standing) for name, peer in known.items()]
    told = [{"name": name, "fingerprint": mark, "standing": standing} for name, mark, standing in rows]
    of(context).emit(told, table("Sites in secure sums", ("site", "fingerprint", "standing"), rows), as_json)


@site.command("confirm")
def site_confirm(
    context: typer.Context,
    name: Annotated[str, typer.Argument(metavar="NAME", help="The other site's name.", show_default=False)],
    fingerprint: Annotated[
        str, typer.Argument(metavar="FINGERPRINT", help="As `atoll site peers` prints it there.", show_default=False)
    ],
    at: At = None,
    as_json: Json = False,
) -> None:
    """Believe another site in secure sums by the key of this fingerprint, and by no other.

    Ask its owner for the fingerprint, not the hub. Said before a site's first sum, nobody is believed unconfirmed.

    Example: atoll site confirm oslo 41a09c1f2c9e77d0 --site zurich
    """
    from atoll.console.document import site_folder
    from atoll.console.show import text
    from atoll.runtime.peers import Peers

    made = Peers(site_folder(of(context).home, at)).confirm(name, fingerprint)
    told = {"name": name, "fingerprint": made.fingerprint, "standing": made.standing}
    of(context).emit(told, text(f"{name} is known here by {made.fingerprint}."), as_json)


@app.command(rich_help_panel="Other")
def key(context: typer.Context, as_json: Json = False) -> None:
    """Print the public half of your key, which is made the first time. From then on it signs the code you submit.

    Example: atoll key
    """
    from atoll.console.document import user_key
    from atoll.console.show import text

    made = user_key(make=True)
    assert made is not None, "it was made"
    of(context).emit({"key": str(made.public)}, text(made.public), as_json)


def _coloured(line: str) -> "Text":
    from atoll.console.show import text

    return text(line, _STYLES.get(line[:1], ""))


def _user() -> str:
    import getpass

    return getpass.getuser()


@contextmanager
def _reviews(context: typer.Context, at: str | None) -> "Iterator[Reviews]":
    """A site's reviews while a command works on them; what it decides is in the site's own journal."""
    from atoll.console.document import site_folder
    from atoll.journal import Journal
    from atoll.runtime.reviews import Reviews

    folder = site_folder(of(context).home, at)
    with Journal(folder / "journal.db", folder.name) as journal:
        yield Reviews(folder, journal, lambda event: journal.append(event, actor=_user()))
