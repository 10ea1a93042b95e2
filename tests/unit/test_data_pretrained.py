"""What a party lists of pretrained models: named by what their files hold, and read only as they were listed."""

from pathlib import Path

import pytest

from atoll.data.catalogue import Catalogue
from atoll.data.live import LiveCatalogue
from atoll.errors import Corrupt, Invalid, NotFound, Unavailable


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "model"
    made.mkdir()
    for name, data in {"config.json": b"{}", "a.safetensors": b"one", "b.safetensors": b"two"}.items():
        (made / name).write_bytes(data)
    return made


def test_a_folder_is_listed_beside_datasets_and_taken_off_again(tmp_path: Path, folder: Path) -> None:
    home, rows = tmp_path / "home", tmp_path / "rows.csv"
    rows.write_text("age\n1\n")
    Catalogue(home).add("rows", rows)
    listed = Catalogue(home).add_pretrained("gemma", folder)
    assert Catalogue(home).add_pretrained("gemma", folder) == listed
    live = LiveCatalogue(home)
    assert live.pretrained() == (listed,)
    assert [dataset.name for dataset in live.datasets()] == ["rows"]
    Catalogue(home).remove("rows")
    assert live.pretrained() == (listed,)
    with pytest.raises(NotFound, match="pretrained: there is no 'gema' here; did you mean 'gemma'"):
        Catalogue(home).remove_pretrained("gema")
    Catalogue(home).remove_pretrained("gemma")
    assert live.pretrained() == ()


def test_the_digest_follows_the_files_and_not_the_place_or_the_name(tmp_path: Path, folder: Path) -> None:
    catalogue, other = Catalogue(tmp_path / "home"), tmp_path / "elsewhere"
    first = catalogue.add_pretrained("one", folder)
    (folder / "README.md").write_text("not of the model")
    (folder / ".cache.json").write_text("{}")
    folder.rename(other)
    assert catalogue.add_pretrained("two", other).digest == first.digest
    (other / "config.json").write_text("{ }")
    assert catalogue.add_pretrained("two", other).digest != first.digest


def test_a_file_is_read_only_as_it_was_listed_and_no_path_is_told(tmp_path: Path, folder: Path) -> None:
    listed = Catalogue(tmp_path / "home").add_pretrained("gemma", folder)
    assert listed.read("a.safetensors") == b"one"
    (folder / "a.safetensors").write_bytes(b"onf")
    (folder / "b.safetensors").unlink()
    told: list[str] = []
    for name, error in {"a.safetensors": Corrupt, "b.safetensors": Unavailable, "../rows.csv": NotFound}.items():
        with pytest.raises(error) as caught:
            listed.read(name)
        told.append(str(caught.value))
    assert not any(str(tmp_path) in words for words in told)


def test_only_a_folder_with_safetensors_is_listed(tmp_path: Path, folder: Path) -> None:
    catalogue = Catalogue(tmp_path / "home")
    with pytest.raises(Invalid, match="pretrained: name"):
        catalogue.add_pretrained("no name", folder)
    for path in folder.glob("*.safetensors"):
        path.rename(path.with_suffix(".bin"))
    with pytest.raises(Invalid, match=r"has no \.safetensors file; convert the weights first"):
        catalogue.add_pretrained("pickled", folder)
    with pytest.raises(NotFound, match="there is no such folder"):
        catalogue.add_pretrained("nowhere", tmp_path / "nowhere")
    assert catalogue.pretrained() == ()
