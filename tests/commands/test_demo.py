"""`ether-diffusion demo`: what is told before the base is loaded."""

import socket

from ether_diffusion.commands.main import main


def test_a_port_in_use_names_the_flag(capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert main(["demo", "--port", str(port)]) == 1
    told = capsys.readouterr().err
    assert f"--port {port}: Address already in use; take another --port, or 0 for any that is free" in told
