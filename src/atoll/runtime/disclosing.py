"""Who reads what runs found: whoever asked for it, and those whom the hub's rules let release it.

What a run found are its result, its losses and metrics, and what rests on them. That there is a run, how far it is and
what crossed for it is for all who may `view`. It is asked with every view that is read, and so is not journalled.
"""

import threading
from collections.abc import Callable, Iterable, Mapping

from atoll.policy.rules import Rules
from atoll.registry.lineage import LineageTree
from atoll.runtime.performing import release
from atoll.runtime.state import State
from atoll.spec.model import Model
from atoll.spec.run import RunView
from atoll.spec.user import LOCAL, User

Sees = Callable[[str, str], bool]  # run, and who asked for it -> whether somebody may read what it found
_About = tuple[str, str, str, str, str | None]  # what a rule can look at of a job
_USERS, _JOBS = 1000, 100_000  # whose answers are remembered, and for each of them about so many jobs


class Disclosing:
    """Asks the hub's rules, each question once as long as they stay the same. Any thread may ask."""

    def __init__(self, rules: Callable[[], Rules], states: Mapping[str, State]) -> None:
        self._rules, self._states = rules, states
        self._turn = threading.Lock()
        self._asked: Rules | None = None  # those that gave the answers
        self._known: dict[User, dict[_About, bool]] = {}

    def reader(self, user: User) -> Sees:
        """Return what tells which runs' results a user may read, by the rules of now: for one answer, not for later."""
        if user.name == LOCAL.name:  # who can read the hub's own files
            return lambda run, asker: True
        rules = self._rules()
        with self._turn:
            if rules is not self._asked or len(self._known) > _USERS:
                self._asked, self._known = rules, {}
            known = self._known.setdefault(user, {})
            if len(known) > _JOBS:
                known.clear()
        return lambda run, asker: asker == user.name or self._sees(rules, known, user, run)

    def _sees(self, rules: Rules, known: dict[_About, bool], user: User, run: str) -> bool:
        state = self._states.get(run)
        if state is None:  # it waits for its approval, and has found nothing
            return False
        job = state.job
        about = (job.name, job.kind, job.purpose, job.project, state.code)
        answer = known.get(about)
        if answer is None:
            answer = known[about] = rules.permits(release(job, user, state.code, None))
        return answer

    def run(self, view: RunView, user: User) -> RunView:
        """Return a run as this user may see it."""
        return self.runs((view,), user)[0]

    def runs(self, views: Iterable[RunView], user: User) -> list[RunView]:
        sees = self.reader(user)
        return [view if sees(view.run, view.user) else view.without_results() for view in views]

    def models(self, models: Iterable[Model], user: User) -> list[Model]:
        """Return models as this user may see them: their metrics and statistics are their runs' results."""
        sees = self.reader(user)
        return [model if self._sees_model(model, sees) else _bare(model) for model in models]

    def model(self, model: Model, user: User) -> Model:
        return self.models((model,), user)[0]

    def lineage(self, tree: LineageTree, user: User) -> LineageTree:
        """Return where a model came from as this user may see it, and likewise its parents."""
        return self._lineage(tree, self.reader(user))

    def _lineage(self, tree: LineageTree, sees: Sees) -> LineageTree:
        parents = tuple(self._lineage(parent, sees) for parent in tree.parents)
        if self._sees_model(tree.model, sees):
            return tree.model_copy(update={"parents": parents})
        return tree.model_copy(update={"parents": parents, "model": _bare(tree.model), "withheld": True})

    def _sees_model(self, model: Model, sees: Sees) -> bool:
        state = self._states.get(model.lineage.run)
        return sees(model.lineage.run, state.user if state is not None else "")


def _bare(model: Model) -> Model:
    return model.model_copy(update={"metrics": {}, "statistics": {}})
