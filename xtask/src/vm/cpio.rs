//! The one archive format that a kernel unpacks by itself: cpio "newc" (Documentation/driver-api/early-userspace/
//! buffer-format.rst), as far as an initramfs needs it. Archives may be put one behind the other.

/// An archive in memory. Everything in it belongs to root.
#[derive(Default)]
pub(super) struct Archive {
    bytes: Vec<u8>,
    inodes: u32,
}

impl Archive {
    /// A directory; its parents have to be added before it.
    pub(super) fn directory(&mut self, name: &str) {
        self.entry(name, 0o040_755, &[]);
    }

    /// A regular file.
    pub(super) fn file(&mut self, name: &str, executable: bool, content: &[u8]) {
        self.entry(name, if executable { 0o100_755 } else { 0o100_644 }, content);
    }

    fn entry(&mut self, name: &str, mode: u32, content: &[u8]) {
        self.inodes += 1;
        self.raw(name, self.inodes, mode, content);
    }

    fn raw(&mut self, name: &str, inode: u32, mode: u32, content: &[u8]) {
        let size = u32::try_from(content.len()).expect("a file of an initramfs is smaller than 4 GiB");
        let name_size = u32::try_from(name.len() + 1).expect("a name is short");
        // Inode, mode, owner, group, links, time, size, device (2), device of a node (2), name's size, checksum.
        let fields = [inode, mode, 0, 0, 1, 0, size, 0, 0, 0, 0, name_size, 0];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes.extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(content);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }

    /// The archive with its end.
    pub(super) fn finish(mut self) -> Vec<u8> {
        self.raw("TRAILER!!!", 0, 0, &[]);
        self.bytes
    }
}

#[cfg(test)]
mod tests {
    use super::Archive;

    #[test]
    fn headers_and_contents_begin_at_multiples_of_four() {
        let mut archive = Archive::default();
        archive.directory("bin");
        archive.file("bin/x", true, b"hello");
        let bytes = archive.finish();
        assert_eq!(bytes.len() % 4, 0);
        let headers: Vec<usize> =
            (0..bytes.len() - 6).filter(|at| bytes[*at..].starts_with(b"070701")).collect();
        // 110 bytes of header, the name and a zero, padding; then the content and padding.
        assert_eq!(headers, [0, 116, 116 + 116 + 8]);
        assert_eq!(&bytes[116 + 14..116 + 22], b"000081ed");
        assert_eq!(&bytes[116 + 116..][..8], b"hello\0\0\0");
    }
}
