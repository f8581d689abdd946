//! A file tree of any size that takes no memory: for measuring the formatter, not its caller.

use crate::{Attributes, FileTree, Node, NodeKind, Run, Timestamp};

/// Files in a directory of a [`SyntheticTree`].
const FILES_PER_DIRECTORY: usize = 250;
/// Names are taken from here: nine hexadecimal digits of the node's index.
const NAME_LENGTH: usize = 9;

/// `files` files of 64 KiB in directories of 250, whose content is successive addresses.
#[derive(Debug, Clone)]
pub struct SyntheticTree {
    files: usize,
    directories: usize,
    names: Vec<[u8; NAME_LENGTH]>,
    file_size: u64,
}

impl SyntheticTree {
    /// A tree of so many files.
    pub fn new(files: usize) -> Self {
        let directories = files.div_ceil(FILES_PER_DIRECTORY);
        let names = (0..=files + directories)
            .map(|index| {
                let mut name = [0; NAME_LENGTH];
                for (position, digit) in name.iter_mut().enumerate() {
                    *digit = b"0123456789abcdef"[index >> (4 * (NAME_LENGTH - 1 - position)) & 15];
                }
                name
            })
            .collect();
        SyntheticTree { files, directories, names, file_size: 64 << 10 }
    }
}

impl FileTree for SyntheticTree {
    fn len(&self) -> usize {
        1 + self.directories + self.files
    }

    fn node(&self, index: usize) -> Node<'_> {
        let time =
            Timestamp { seconds: 1_700_000_000 + index as i64, nanoseconds: index as u32 % 1_000_000_000 };
        let (parent, kind, mode) = if index <= self.directories {
            (0, NodeKind::Directory, 0o755)
        } else {
            let file = index - 1 - self.directories;
            let parent = 1 + file / FILES_PER_DIRECTORY;
            (parent as u32, NodeKind::File { size: self.file_size }, 0o644)
        };
        let attributes = Attributes { uid: 0, gid: 0, mode, atime: time, mtime: time, ctime: time };
        Node { parent, name: &self.names[index], kind, attributes }
    }

    fn runs(&self, index: usize, visit: &mut dyn FnMut(Run)) {
        let file = (index - 1 - self.directories) as u64;
        visit(Run { file_offset: 0, address: file * self.file_size, length: self.file_size });
    }

    fn xattrs(&self, _index: usize, _visit: &mut dyn FnMut(&[u8], &[u8])) {}
}
