# A server that the client starts: on standard input, and on a socket passed as systemd passes one.
for connect_by, arguments in [
    ("connect_command", [uri, "serve", "--stdio", "memory:1M"]),
    ("connect_systemd_socket_activation", [uri, "serve", "memory:1M"]),
]:
    h = nbd.NBD()
    getattr(h, connect_by)(arguments)
    assert h.get_size() == 1 << 20, connect_by
    h.pwrite(b"d" * 65536, 100)
    assert h.pread(65536, 100) == b"d" * 65536, connect_by
    h.shutdown()
