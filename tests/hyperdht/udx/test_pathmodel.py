"""What is known of a path, and that all of it is forgotten on another one."""

from p2pclaude.hyperdht.udx.pathmodel import PathModel


def test_another_path_begins_anew() -> None:
    path = PathModel(1200, 1500, 3)
    path.rtt.add_sample(0.1)
    path.search.packet_arrived(1200, 5)
    congestion, pacer = path.congestion, path.pacer
    congestion.window = 7
    pacer.budget(1.0, 1e6, 1000)
    path.reset(9)
    path.search.mtu = 1400
    path.reset(9)
    assert path.rtt.srtt is None
    assert path.congestion is not congestion and path.pacer is not pacer
    assert path.congestion.window == 32 * 1200 and path.search.mtu == 1200
    assert path.congestion._cycle._first == congestion._cycle._first == 2 + 3 % 6


def test_congestion_counts_in_packets_of_the_size_found() -> None:
    path = PathModel(1200, 1500, 0)
    path.search.mtu = 1400
    assert path.congestion.mss == 1200
    path.fit_size()
    assert path.congestion.mss == 1400
