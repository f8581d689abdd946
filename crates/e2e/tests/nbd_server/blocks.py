h = connect()
assert h.get_block_size(nbd.SIZE_MINIMUM) == 4096
h.pwrite(b"e" * (256 << 10), 0)
for offset, length in [(0, 512), (512, 4096), (4096, 4097)]:
    fails(errno.EINVAL, h.pread, length, offset)
    fails(errno.EINVAL, h.pwrite, b"f" * length, offset)
    fails(errno.EINVAL, h.zero, length, offset)
    fails(errno.EINVAL, h.trim, length, offset)
assert h.pread(256 << 10, 0) == b"e" * (256 << 10)
h.shutdown()
