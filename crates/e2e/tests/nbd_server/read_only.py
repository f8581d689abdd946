h = connect()
assert h.is_read_only()
for call, arguments in [(h.pwrite, (b"x" * 512, 0)), (h.zero, (512, 0)), (h.trim, (512, 0))]:
    fails(errno.EPERM, call, *arguments)
    assert len(h.pread(512, 0)) == 512, "the connection goes on"
h.shutdown()
