# The handshake option by option.
h = nbd.NBD()
h.set_opt_mode(True)
h.connect_uri(uri)
exports = []
h.opt_list(lambda name, description: exports.append(name))
assert exports == [""], exports
h.set_export_name("none")
fails(errno.ENOENT, h.opt_info)
h.set_export_name("")
contexts = []
h.opt_list_meta_context(lambda name: contexts.append(name))
assert contexts == ["base:allocation", "loam:locality"], contexts
for query, found in [("base:", ["base:allocation"]), ("loam:", ["loam:locality"]), ("x:", [])]:
    contexts = []
    h.clear_meta_contexts()
    h.add_meta_context(query)
    h.opt_list_meta_context(lambda name: contexts.append(name))
    assert contexts == found, (query, contexts)
h.clear_meta_contexts()
h.opt_info()
assert h.get_size() == 64 << 20
h.opt_go()
assert h.pread(512, 0) is not None
h.shutdown()

h = nbd.NBD()
h.set_opt_mode(True)
h.connect_uri(uri)
h.opt_abort()

# Old handshakes: without NO_ZEROES, and without fixed newstyle (EXPORT_NAME).
for flags in (nbd.HANDSHAKE_FLAG_FIXED_NEWSTYLE, 0):
    h = nbd.NBD()
    h.set_handshake_flags(flags)
    h.connect_uri(uri)
    assert h.get_size() == 64 << 20
    h.pwrite(b"c" * 512, 512)
    assert h.pread(512, 512) == b"c" * 512
    h.shutdown()
