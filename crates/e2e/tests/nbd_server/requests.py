h = connect("base:allocation", "loam:locality")
size = h.get_size()
assert h.get_structured_replies_negotiated()

# Right.
h.pwrite(b"a" * 4096, 8192, nbd.CMD_FLAG_FUA)
assert h.pread(4096, 8192) == b"a" * 4096
h.pwrite(b"odd", 12345)
assert h.pread(5, 12344) == b"\0odd\0"
for flags in (0, nbd.CMD_FLAG_DF):
    chunks = []
    h.pread_structured(1 << 20, 0, lambda data, offset, status, error: chunks.append((offset, len(data))), flags)
    assert sum(length for _, length in chunks) == 1 << 20, chunks
    assert flags == 0 or len(chunks) == 1, chunks
h.zero(4096, 8192, nbd.CMD_FLAG_FAST_ZERO)
assert h.pread(4096, 8192) == bytes(4096)
h.zero(4096, 8192, nbd.CMD_FLAG_NO_HOLE | nbd.CMD_FLAG_FUA)
h.trim(1 << 20, 1 << 20, nbd.CMD_FLAG_FUA)
h.cache(65536, 0)
h.flush()

h.pwrite(b"b" * 65536, 4 << 20)
def extents(count, offset, flags=0):
    seen = {}
    h.block_status(count, offset, lambda context, at, entries, error: seen.update({context: entries}), flags)
    return seen
seen = extents(4 << 20, 3 << 20)
assert seen["base:allocation"] == [1 << 20, 3, 65536, 0, (3 << 20) - 65536, 3], seen
assert sum(seen["loam:locality"][::2]) <= 4 << 20 and set(seen["loam:locality"][1::2]) == {0}, seen
assert extents(4 << 20, 3 << 20, nbd.CMD_FLAG_REQ_ONE)["base:allocation"] == [1 << 20, 3]

# Many at once, out of order.
buffers = [nbd.Buffer(4096) for _ in range(500)]
done = []
for index, buffer in enumerate(buffers):
    h.aio_pread(buffer, (index * 7919 * 4096) % size, lambda error, index=index: done.append(index) or 1)
while len(done) < len(buffers):
    h.poll(-1)

# Wrong: each with the error of the protocol, and the connection goes on.
nothing = lambda *arguments: 0
for offset in (size, size - 1, 1 << 63, (1 << 64) - 4096):
    fails(errno.EINVAL, h.pread, 4096, offset)
    fails(errno.ENOSPC, h.pwrite, b"x" * 4096, offset)
    fails(errno.ENOSPC, h.zero, 4096, offset)
    fails(errno.EINVAL, h.trim, 4096, offset)
    fails(errno.EINVAL, h.cache, 4096, offset)
    fails(errno.EINVAL, h.block_status, 4096, offset, nothing)
fails(errno.EINVAL, h.pread, 512, 0, nbd.CMD_FLAG_FAST_ZERO)
fails(errno.EINVAL, h.pread, 512, 0, 1 << 7)
fails(errno.EINVAL, h.pwrite, b"x" * 512, 0, nbd.CMD_FLAG_NO_HOLE)
fails(errno.EINVAL, h.trim, 512, 0, nbd.CMD_FLAG_NO_HOLE)
fails(errno.EINVAL, h.cache, 512, 0, nbd.CMD_FLAG_DF)
fails(errno.EINVAL, h.flush, nbd.CMD_FLAG_DF)
fails(errno.ENOTSUP, h.zero, 512, 0, nbd.CMD_FLAG_FAST_ZERO | nbd.CMD_FLAG_NO_HOLE)
assert h.pread(512, 4 << 20) == b"b" * 512
h.shutdown()

# Without structured replies, and without a context that was asked for.
h = connect(structured=False)
assert not h.get_structured_replies_negotiated()
assert h.pread(512, 4 << 20) == b"b" * 512
fails(errno.EINVAL, h.pread, 4096, size)
fails(errno.EINVAL, h.pread, 512, 0, nbd.CMD_FLAG_DF)
fails(errno.EINVAL, h.block_status, 4096, 0, nothing)
assert h.pread(512, 4 << 20) == b"b" * 512
h.shutdown()
h = connect()
fails(errno.EINVAL, h.block_status, 4096, 0, nothing)
h.shutdown()
h = connect("x:unknown", "base:allocation")
assert h.can_meta_context("base:allocation") and not h.can_meta_context("x:unknown")
h.shutdown()
