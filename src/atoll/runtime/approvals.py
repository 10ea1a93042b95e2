"""What a rule lets nobody do alone: kept as it was asked, and carried out once another user agrees.

All of it is a fold of the journal. The yes and what comes of it are journalled in one transaction, so a hub that is
killed at any instant has either carried a request out or still has it waiting.
"""

import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

from atoll.boundary.gate import Gate
from atoll.errors import Denied, Invalid, NotFound, Unapproved
from atoll.journal import Entry
from atoll.runtime.planning import asking
from atoll.runtime.users import Users
from atoll.spec.document import digest, near_miss
from atoll.spec.event import Event
from atoll.spec.job import Job
from atoll.spec.policy import Action, Decision, Request
from atoll.spec.run import RunView
from atoll.spec.user import (
    ApprovalAnswered,
    ApprovalAsked,
    ApprovalView,
    Deploying,
    Erasure,
    Promotion,
    Submission,
    User,
    Wanted,
)

PATIENCE = 7 * 24 * 3600.0  # seconds for which a request waits
_MOST = 1000  # that wait at a time: whoever may ask for such things could fill the journal with them
_ACTIONS: dict[str, Action] = {
    "submission": "submit",
    "promotion": "promote",
    "deploying": "deploy",
    "erasure": "erase",
}
Record = Callable[..., object]  # (*events, actor) -> once it returns they are durable and folded
# Does what is wanted, and gives what is to be journalled of it; what it has checked holds while it is open.
Carry = Callable[[Wanted, User], AbstractContextManager[Event]]


@dataclass(slots=True)
class _Kept:
    asked: ApprovalAsked
    since: float
    answer: ApprovalAnswered | None = None

    def view(self, now: float) -> ApprovalView:
        if self.answer is not None:
            state = "approved" if self.answer.approved else "rejected"
        else:
            state = "waiting" if now < self.asked.expires else "expired"
        told = self.asked.model_dump(exclude={"kind", "run", "user"})
        by = self.answer.by if self.answer else ""
        return ApprovalView(**told, user=self.asked.user.name, asked=self.since, state=state, by=by)


class Approvals:
    """Fed every journal entry in order; any thread may ask."""

    def __init__(self, gate: Gate, record: Record, users: Users, patience: float = PATIENCE) -> None:
        self._gate, self._record, self._users, self._patience = gate, record, users, patience
        self._kept: dict[str, _Kept] = {}
        self._runs: dict[str, str] = {}  # run that somebody wants -> its approval
        self._busy: set[str] = set()  # that somebody is answering
        self._turn = threading.Lock()  # from a look at what is there to the change of it

    def seen(self, entry: Entry) -> None:
        match entry.event:
            case ApprovalAsked() as event:
                self._kept[event.approval] = _Kept(event, entry.time)
                if event.run is not None:
                    self._runs[event.run] = event.approval
            case ApprovalAnswered() as event if event.approval in self._kept:
                kept = self._kept[event.approval]
                kept.answer = kept.answer or event
            case _:
                pass

    def keep(self, user: User, wanted: Wanted, decision: Decision) -> ApprovalAsked:
        """Have a request wait for another user; one that waits already for the same thing of the same user is it."""
        now, what = time.time(), digest(wanted)
        with self._turn:
            waiting = [one.asked for one in self._kept.values() if one.view(now).state == "waiting"]
            for one in waiting:
                if (one.user.name, one.digest) == (user.name, what):
                    return one
            if len(waiting) >= _MOST:
                raise Invalid(f"approvals: {_MOST} requests wait already; answer some with `atoll approve` or `reject`")
            asked = ApprovalAsked(
                approval=f"ask-{secrets.token_hex(4)}",
                run=wanted.run if isinstance(wanted, Submission) else None,
                user=user,
                wanted=wanted,
                digest=what,
                roles=decision.approvers,
                words=f"{_said(wanted)}: {decision}",
                expires=now + self._patience,
            )
            self._record(asked, actor=user.name)
        return asked

    def need(self, user: User, wanted: Wanted, subject: str) -> None:
        """Ask the hub's rules for a promotion, a deployment or an erasure, journalled. Raises `Denied`, and
        `Unapproved` once it is kept for another user."""
        decision = self._gate.ask(_question(user, wanted), subject, alone=False)
        if not decision.allowed:
            asked = self.keep(user, wanted, decision)
            raise Unapproved(f"{decision}; it waits as {asked.approval} (they run: atoll approve {asked.approval})")

    def approve(self, name: str, what: str, user: User, carry: Carry) -> ApprovalView:
        """Agree to what waits, by its name and its digest, and have it carried out as it was asked.

        Raises `NotFound`, `Invalid` for another digest, `Denied` for who may not, or may no more, and whatever
        ``carry`` raises; then it still waits.
        """
        with self._answering(name, what) as asked:
            asker = self._users.renewed(asked.user)
            self._check(asked, user)
            now = self._gate.decide(_question(asker, asked.wanted))  # the rules, and the asker's roles, may be others
            if not (now.allowed or now.approvers):
                raise Denied(str(now))
            if now.approvers and not set(now.approvers) & set(user.roles):
                raise Denied(f"approval {name}: {now}, and {user.name!r} has {', '.join(user.roles) or 'no role'}")
            answer = ApprovalAnswered(approval=name, run=asked.run, by=user.name, approved=True)
            with carry(asked.wanted, asker) as done:
                self._record(answer, done, actor=user.name)
        return self._kept[name].view(time.time())

    def reject(self, name: str, what: str, user: User) -> ApprovalView:
        """Say no to what waits; whoever asked for it may, too. Raises as `approve`."""
        with self._answering(name, what) as asked:
            if asked.user.name != user.name:
                self._check(asked, user)
            self._record(ApprovalAnswered(approval=name, run=asked.run, by=user.name, approved=False), actor=user.name)
        return self._kept[name].view(time.time())

    def views(self) -> list[ApprovalView]:
        """Return what was ever asked, the oldest first."""
        now = time.time()
        return [kept.view(now) for kept in tuple(self._kept.values())]

    def of_run(self, run: str) -> ApprovalAsked | None:
        """Return the request for a run of this name, whatever became of it."""
        name = self._runs.get(run)
        return self._kept[name].asked if name is not None else None

    def runs(self) -> list[str]:
        """Return the runs that were asked for and not approved, also those that never will be."""
        return [run for run, name in tuple(self._runs.items()) if self._kept[name].view(0.0).state != "approved"]

    def run_view(self, run: str) -> RunView | None:
        """Return how a run looks that waits for its approval, or did not get it."""
        name = self._runs.get(run)
        if name is None:
            return None
        kept, now = self._kept[name], time.time()
        view, wanted = kept.view(now), kept.asked.wanted
        assert isinstance(wanted, Submission)
        roles = " or ".join(view.roles)
        words = {
            "waiting": f"waits for approval by another {roles} (they run: atoll approve {name})",
            "expired": f"nobody approved {name} in time; submit it again",
            "rejected": f"{view.by} rejected {name}",
            "approved": "",
        }[view.state]
        about = {"run": run, "name": wanted.job.name, "job_kind": wanted.job.kind, "purpose": wanted.job.purpose}
        over = {} if view.state == "waiting" else {"error": Unapproved.__name__}
        state = "waiting" if view.state == "waiting" else "failed"
        clock = {"started": kept.since, "seconds": max(0.0, now - kept.since)}
        return RunView.model_validate({**about, "user": view.user, "state": state, "words": words, **over, **clock})

    @contextmanager
    def _answering(self, name: str, what: str) -> Iterator[ApprovalAsked]:
        """Have a request that waits for oneself alone: a replica may take minutes to start, and starts once."""
        with self._turn:
            asked = self._waiting(name, what)
            if name in self._busy:
                raise Invalid(f"approval {name}: another user is answering it; look at it again")
            self._busy.add(name)
        try:
            yield asked
        finally:
            with self._turn:
                self._busy.discard(name)

    def _waiting(self, name: str, what: str) -> ApprovalAsked:
        if name not in self._kept:
            known = near_miss(name, [one.approval for one in self.views() if one.state == "waiting"])
            raise NotFound(f"approval: there is no {name!r}{known or '; nothing waits for any'}")
        kept = self._kept[name]
        state = kept.view(time.time()).state
        if state != "waiting":
            raise Invalid(f"approval {name}: is {state}; ask for it again")
        if not what == kept.asked.digest == digest(kept.asked.wanted):
            raise Invalid(f"approval {name}: {what[:19]}... is not what was asked for; look at it again")
        return kept.asked

    def _check(self, asked: ApprovalAsked, user: User) -> None:
        """Hold whoever answers to the rules: another person, of a role that the rule names, who may approve."""
        if asked.user.name == user.name:  # whatever the rules say, and by whichever token
            raise Denied(f"approval {asked.approval}: nobody approves what they asked for themselves; another user can")
        request = _question(user, asked.wanted).model_copy(update={"action": "approve", "by": asked.user.name})
        self._gate.ask(request, f"{asked.approval}: {_said(asked.wanted)}", asked.run)
        if not set(asked.roles) & set(user.roles):
            wanted = " or ".join(asked.roles)
            raise Denied(f"approval {asked.approval}: {user.name!r} is no {wanted}, as the rule wants it")


def _question(user: User, wanted: Wanted) -> Request:
    about: Job | str
    match wanted:
        case Submission():
            about = wanted.job
        case Promotion() | Erasure():
            about = wanted.model
        case Deploying():
            about = wanted.deployment.model
    return asking(_ACTIONS[wanted.kind], user, about)


def _said(wanted: Wanted) -> str:
    match wanted:
        case Submission():
            return f"run {wanted.run}: {wanted.job.kind} {wanted.job.name} for {wanted.job.purpose}"
        case Promotion():
            return f"{wanted.model} as {wanted.alias}"
        case Erasure():
            return f"erase {wanted.model}"
        case Deploying():
            return f"deploy {wanted.deployment.model} as {wanted.deployment.name}"
