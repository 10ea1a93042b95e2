"""Code that an owner reads, approves or rejects, or knows by its signature; and rules that ask for that."""

import pytest

from atoll.errors import Denied, Invalid, NotFound
from atoll.journal import Journal
from atoll.journal.key import Key
from atoll.registry.signed import SIGNATURE, sign, signer
from atoll.runtime import reviews as module
from atoll.runtime.incoming import Incoming
from atoll.runtime.kept import RunFolder
from atoll.runtime.reports import Reports
from atoll.runtime.reviews import Reviews
from atoll.spec.document import canonical, sha256
from atoll.spec.model import Bundle
from tests.unit.places import CODE, assign

DIGEST, ADA = sha256(CODE), Key.new("ada")
FIRST, SECOND = (Bundle(files={"task.py": f"class Risk:\n    rate = {rate}\n"}) for rate in (1, 2))
ASKING = '(context.kind != "code" || context.approved || context.signer == "ada")'


def code_of(bundle):
    return sha256(canonical(bundle))


@pytest.fixture
def journal(tmp_path):
    with Journal(tmp_path / "journal.db", "lyon") as made:
        yield made


def reviews_of(home, journal):
    return Reviews(home, journal, lambda event: journal.append(event, actor="owner"))


@pytest.fixture
def reviews(tmp_path, journal):
    return reviews_of(tmp_path, journal)


def test_what_waits_is_listed_and_what_is_decided_about_it_outlives_the_process(reviews, tmp_path, journal):
    reviews.keep(FIRST, "task.py:Risk", "risk", "bob")
    reviews.keep(FIRST, "task.py:Risk", "risk", "bob")
    (waits,) = reviews.views()
    assert (waits.state, waits.job, waits.user, waits.signer) == ("waiting", "risk", "bob", "")
    assert not reviews.approved(code_of(FIRST))
    other = reviews_of(tmp_path, journal)  # a command of the owner's, in another process
    assert other.named(waits.code[7:15]) == waits.code
    other.review(waits.code, True, "eva")
    assert reviews.approved(waits.code)
    other.review(waits.code, False, "eva")
    assert not reviews.approved(waits.code)
    assert [(one.state, one.user) for one in reviews.views()] == [("rejected", "eva")]
    assert [entry.event.kind for entry in journal.entries()] == ["code.kept", "code.reviewed", "code.reviewed"]


def test_code_is_compared_with_the_last_approved_one_of_its_own_task(reviews):
    for bundle, task in ((FIRST, "task.py:Risk"), (SECOND, "task.py:Risk"), (Bundle(files={"x.py": ""}), "x.py:X")):
        reviews.keep(bundle, task, "risk", "bob")
    assert reviews.before(code_of(SECOND)) is None
    reviews.review(code_of(FIRST), True, "eva")
    assert reviews.before(code_of(SECOND)) == (code_of(FIRST), FIRST)
    assert reviews.before(code_of(Bundle(files={"x.py": ""}))) is None


def test_of_much_that_waits_what_came_first_is_let_go(reviews, monkeypatch):
    monkeypatch.setattr(module, "_WAITING", 3)
    bundles = [Bundle(files={"task.py": f"# {number}"}) for number in range(5)]
    for bundle in bundles:
        reviews.keep(bundle, "task.py:Risk", "risk", "bob")
    assert [one.code for one in reviews.views()] == [code_of(bundle) for bundle in bundles[2:]]
    with pytest.raises(NotFound, match="is not kept any more; submit its job again"):
        reviews.review(code_of(bundles[0]), True, "eva")
    reviews.keep(bundles[0], "task.py:Risk", "risk", "bob")
    assert code_of(bundles[0]) in [one.code for one in reviews.views()]


def test_a_digest_is_named_by_its_beginning_where_that_is_one(reviews):
    with pytest.raises(NotFound, match="atoll site code"):
        reviews.named("abc")
    bundles = [Bundle(files={"task.py": f"# {number}"}) for number in range(17)]  # two begin alike
    for bundle in bundles:
        reviews.keep(bundle, "task.py:Risk", "risk", "bob")
    with pytest.raises(Invalid, match="begins 17 digests"):
        reviews.named("sha256:")


def test_a_signature_is_of_all_files_and_of_no_others():
    signed = sign(FIRST, ADA)
    assert signer(signed) == ADA.public
    assert signer(FIRST) is None
    assert sign(signed, ADA) == signed
    wrongs = (
        {**signed.files, "task.py": "class Evil: pass"},
        {**signed.files, "more.py": ""},
        {**signed.files, SIGNATURE: signed.files[SIGNATURE].replace(str(ADA.public), str(Key.new("ada").public))},
        {**signed.files, SIGNATURE: "mine"},
        {**signed.files, SIGNATURE: ""},
        {**signed.files, SIGNATURE: signed.files[SIGNATURE] + "\n"},
    )
    for files in wrongs:
        with pytest.raises(Invalid):
            signer(Bundle(files=files))


def test_rules_know_a_signer_by_the_name_the_owner_gave_and_only_while_trusted(reviews):
    signed = sign(FIRST, ADA)
    reviews.keep(signed, "task.py:Risk", "risk", "bob")
    code = code_of(signed)
    assert reviews.signer(code) == ""
    reviews.trust(str(ADA.public), "ada", True, "eva")
    assert (reviews.signer(code), reviews.signer(""), reviews.signer(DIGEST)) == ("ada", "", "")
    reviews.trust(str(ADA.public), "ada", False, "eva")
    assert reviews.signer(code) == ""
    with pytest.raises(Invalid, match="is no key"):
        reviews.trust("ssh-ed25519 AAAA", "ada", True, "eva")


def incoming(lyon):
    return Incoming(lyon.place, RunFolder(lyon.home / "runs" / "run"), Reports(lyon.place))


def test_code_that_is_not_approved_is_kept_to_be_read_and_not_laid_out(lyon):
    lyon.policy = lyon.policy.replace('["model", "code", "query"]', f'{ASKING} && ["model", "code", "query"]')
    a = assign()
    for _ in range(2):
        with pytest.raises(Denied, match=f"its owner lets it run by: atoll site approve {DIGEST}"):
            incoming(lyon).bundle(a)
    assert not (lyon.home / "code").exists()
    reviews = lyon.place.reviews
    assert [(one.code, one.state, one.task) for one in reviews.views()] == [(DIGEST, "waiting", "task.py:Task")]
    crossed = [entry.event for entry in lyon.journal.entries(kinds=("crossing",))]
    assert {(one.decision.allowed, str(one.decision)) for one in crossed} >= {
        (True, "lyon takes it in to be read, and does not run it")
    }
    reviews.review(DIGEST, True, "eva")
    assert incoming(lyon).bundle(a).is_dir()
    reviews.review(DIGEST, False, "eva")
    with pytest.raises(Denied, match=r"context\.approved"):  # though it lies here since
        incoming(lyon).bundle(a)


def test_code_by_a_trusted_key_runs_unread_and_a_hub_is_let_plan_with_what_can_be_read(lyon, monkeypatch):
    lyon.policy = lyon.policy.replace('["model", "code", "query"]', f'{ASKING} && ["model", "code", "query"]')
    data = canonical(sign(FIRST, ADA))
    monkeypatch.setattr("tests.unit.places.CODE", data)
    a = assign(code=sha256(data))
    asked = lyon.place.crossing(a, "code", out=False, size=0, digest=a.code)
    assert lyon.place.answer(asked).decision.allowed
    assert not lyon.place.account(asked).decision.allowed
    with pytest.raises(Denied, match="to be read"):
        incoming(lyon).bundle(a)
    lyon.place.reviews.trust(str(ADA.public), "ada", True, "eva")
    assert incoming(lyon).bundle(a).is_dir()
    lyon.policy = lyon.policy.replace(ASKING, '(context.kind != "code" || context.signer == "someone")')
    assert not lyon.place.answer(asked).decision.allowed


def test_code_that_a_rule_refuses_for_another_reason_does_not_even_come_in(lyon):
    lyon.policy += '@id("no.code") forbid (principal, action, resource) when { context.kind == "code" };'
    with pytest.raises(Denied, match=r"no\.code"):
        incoming(lyon).bundle(assign())
    assert lyon.hub.given == []
    assert lyon.place.reviews.views() == []
