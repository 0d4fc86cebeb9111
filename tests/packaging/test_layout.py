"""`kernels/` and `api_schemas/` are folders on the path, never packages: an import package called `kernels` is taken
by transformers for the Hugging Face package of that name."""

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", ["kernels", "api_schemas"])
def test_a_source_root_cannot_be_imported(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))  # the worst case: somebody runs python in the repository
    spec = importlib.util.find_spec(name)
    assert spec is None or spec.origin is None or not Path(spec.origin).is_relative_to(ROOT)


def test_no_package_marker_lies_where_it_would_make_a_package_of_a_plain_folder() -> None:
    roots = [ROOT / "src", ROOT / "kernels", ROOT / "api_schemas"]
    markers = [root / "__init__.py" for root in roots] + list((ROOT / "tests").rglob("__init__.py"))
    assert [path for path in markers if path.exists()] == []
