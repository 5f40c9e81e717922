from foveate.bench import switch


def test_small_model_switches_without_moving():
    measured = switch.measure(layers=3, width=96, switches=5)
    assert measured.figures["bytes_moved"] == 0
    assert measured.figures["outputs_identical"] == 1
    assert 0 < measured.figures["switch_us_median"] <= measured.figures["switch_us_p99"]
    assert len(measured.rounds) == 5


def test_a_changed_plane_is_noticed():
    import torch

    plane = torch.zeros(64, dtype=torch.uint8)
    before = switch._state([("a", plane)])
    plane[3] = 1
    assert switch._state([("a", plane)]) != before
    assert switch._state([("a", plane.clone())])["a"][0] != before["a"][0]
