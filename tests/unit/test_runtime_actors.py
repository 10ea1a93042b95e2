"""How a site asks for Ray, and what is told of it; the actors themselves are in tests/system."""

import sys

import pytest
import yaml

from atoll.errors import Invalid, Unavailable
from atoll.runtime import site as sites
from atoll.runtime.actors import RayExecutor
from atoll.spec.document import parse
from atoll.spec.fleet import Executor, SiteFile


def test_how_a_site_starts_its_ranks_is_in_its_document_and_told_to_nobody(tmp_path):
    document = {"name": "lyon", "owner": "Lyon", "nodes": [{"devices": [{}, {}]}], "executor": {"kind": "ray"}}
    (tmp_path / "site.yaml").write_text(yaml.safe_dump(document))
    told = sites.read(tmp_path)
    assert "executor" not in told.model_dump()
    assert (told.owner, len(told.nodes[0].devices)) == ("Lyon", 2)
    assert parse(SiteFile, document, "site").executor == Executor(kind="ray", address="local")


@pytest.mark.parametrize(
    ("executor", "words"),
    [
        ({"address": "10.0.0.7:6379"}, "add kind: ray, or remove them"),
        ({"kind": "rya"}, "executor.kind: 'rya'"),
        ({"kind": "ray", "address": "auto"}, "executor.address: 'auto'"),
        ({"kind": "ray", "cpus": 0}, "executor.cpus: 0"),
        ({"kind": "ray", "labels": {"ray.io/accelerator-type": "!H100"}}, "executor.labels"),
    ],
)
def test_a_document_that_asks_for_what_cannot_be_is_told_where(executor, words):
    with pytest.raises(Invalid) as refusal:
        parse(SiteFile, {"name": "lyon", "executor": executor}, "site.yaml")
    assert words in str(refusal.value)


def test_a_site_without_ray_installed_says_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)  # which is how Python writes down that there is none
    with pytest.raises(Unavailable, match=r"Ray is not installed here; install it by: pip install 'atoll\[ray\]'"):
        RayExecutor(Executor(kind="ray"), 1, tmp_path)
