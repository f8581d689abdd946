//! NBD URIs, by <https://github.com/NetworkBlockDevice/nbd/blob/master/doc/uri.md>.
