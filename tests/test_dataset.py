"""Tables that cannot be are refused by every stage that reads them."""

import pandas as pd
import pytest

from chest.dataset import MANIFEST_COLUMNS, read_manifest
from chest.errors import InputError

TABLE = pd.DataFrame("x", index=range(3), columns=list(MANIFEST_COLUMNS)).assign(
    image_id=["a", "b", "c"], label=["covid19", "normal", "tuberculosis"], modality="ct"
)


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"image_id": ["a", "a", "c"]}, "images doubled"),
        ({"image_id": ["b", "a", "c"]}, "not in order"),
        ({"label": ["covid19", "normal", "flu"]}, "the label 'flu'"),
        ({"modality": ["ct", "mri", "ct"]}, "the modality 'mri'"),
    ],
)
def test_a_poisoned_manifest_is_refused(tmp_path, monkeypatch, changed, told):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    TABLE.to_csv("data/manifest.csv", index=False)
    assert read_manifest().equals(TABLE)
    TABLE.assign(**changed).to_csv("data/manifest.csv", index=False)
    with pytest.raises(InputError, match=told):
        read_manifest()
