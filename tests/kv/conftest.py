import pytest

from common.kv.connectors import sender


@pytest.fixture
def one_layer_a_frame(monkeypatch):
    """As with a big model, whose layers are over the size up to which they go together."""
    monkeypatch.setattr(sender, "MIN_FRAME_BYTES", 1)
    monkeypatch.setattr(sender, "EARLY_FRAME_BYTES", 1)
