//! Member by member through an archive.

use super::header::{Header, c_string};
use super::pax::Extended;
use super::{BLOCK_BYTES, EXTENDED_BYTES_MAX, Input, Segment, sparse};
use crate::entry::{Metadata, Time};
use crate::{Error, Result};

/// Longest part of an entry's path that an error shows, bytes.
const SHOWN_BYTES_MAX: usize = 512;

/// What a member is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum MemberKind {
    /// A directory.
    Directory,
    /// A regular file; its stored bytes are next in the archive. `segments` says where they lie in a sparse file.
    File { size: u64, segments: Option<Vec<Segment>> },
    /// A symbolic link.
    Symlink(Vec<u8>),
    /// A hard link to the member of this path.
    HardLink(Vec<u8>),
    /// A character device: major, minor.
    CharacterDevice(u32, u32),
    /// A block device: major, minor.
    BlockDevice(u32, u32),
    /// A named pipe.
    Fifo,
}

/// One member, its path as it stands in the archive.
#[derive(Debug, Clone)]
pub(crate) struct Member {
    pub(crate) path: Vec<u8>,
    pub(crate) kind: MemberKind,
    pub(crate) metadata: Metadata,
}

/// Reads an archive from its beginning.
pub(crate) struct TarReader<'a> {
    input: Input<'a>,
    /// Bytes of the current member's data that nobody has taken, and of the padding behind it.
    data_left: u64,
    padding: u64,
    globals: Extended,
    global_bytes: u64,
    /// The member being read, for messages.
    current: Vec<u8>,
}

impl<'a> TarReader<'a> {
    pub(crate) fn new(input: Input<'a>) -> Self {
        TarReader {
            input,
            data_left: 0,
            padding: 0,
            globals: Extended::default(),
            global_bytes: 0,
            current: Vec::new(),
        }
    }

    /// Where in the decoded archive the next byte lies: after [`TarReader::next`], the member's data.
    pub(crate) fn position(&self) -> u64 {
        self.input.position()
    }

    /// An error about the current member.
    pub(crate) fn error(&self, reason: impl Into<String>) -> Error {
        archive_error(&self.current, self.input.position(), reason.into())
    }

    /// Goes to the next member; `None` at the end-of-archive mark.
    pub(crate) fn next(&mut self) -> Result<Option<Member>> {
        self.skip_data()?;
        let mut extended = self.globals.clone();
        let mut extended_left = EXTENDED_BYTES_MAX;
        loop {
            let Some((block, header)) = self.header()? else { return Ok(None) };
            match header.kind {
                b'x' | b'X' => {
                    let records = self.extended_data(&header, &mut extended_left)?;
                    extended.parse(&records).map_err(|reason| self.error(reason))?;
                    self.name(&extended);
                }
                b'g' => {
                    let mut left = EXTENDED_BYTES_MAX - self.global_bytes;
                    let records = self.extended_data(&header, &mut left)?;
                    self.global_bytes = EXTENDED_BYTES_MAX - left;
                    let mut globals = std::mem::take(&mut self.globals);
                    globals.parse(&records).map_err(|reason| self.error(reason))?;
                    extended.parse(&records).map_err(|reason| self.error(reason))?;
                    // A map of segments belongs to one entry.
                    globals.sparse = Default::default();
                    self.globals = globals;
                }
                b'L' => {
                    let name = self.extended_data(&header, &mut extended_left)?;
                    extended.path = Some(c_string(&name).to_vec());
                    self.name(&extended);
                }
                b'K' => {
                    let name = self.extended_data(&header, &mut extended_left)?;
                    extended.link = Some(c_string(&name).to_vec());
                }
                // The volume's label.
                b'V' => {
                    self.begin_data(header.size().map_err(|reason| self.error(reason))?)?;
                    self.skip_data()?;
                }
                b'M' => {
                    return Err(self.error(
                        "a continuation from another volume: multi-volume archives are not supported",
                    ));
                }
                b'N' => return Err(self.error("the obsolete GNU long-name format is not supported")),
                _ => return self.member(&block, &header, extended).map(Some),
            }
        }
    }

    /// Hands the member's next `length` data bytes to `take`, in pieces.
    pub(crate) fn data(&mut self, length: u64, take: impl FnMut(&[u8]) -> Result<()>) -> Result<()> {
        if length > self.data_left {
            return Err(self.error("has fewer bytes than its map says"));
        }
        let current = String::from_utf8_lossy(&self.current);
        self.input.copy(length, &format!("{current:?}"), take)?;
        self.data_left -= length;
        Ok(())
    }

    /// Reads what is left behind the end-of-archive mark, at most `limit` bytes.
    pub(crate) fn drain(&mut self, limit: u64) -> Result<()> {
        self.input.drain(limit)
    }

    fn name(&mut self, extended: &Extended) {
        if let Some(path) = extended.sparse.name.as_ref().or(extended.path.as_ref()) {
            self.current.clone_from(path);
        }
    }

    /// The next header block; `None` at the end-of-archive mark.
    fn header(&mut self) -> Result<Option<([u8; 512], Header)>> {
        let mut block = [0; 512];
        let filled = self.input.fill(&mut block)?;
        if filled < block.len() {
            let missing = match filled {
                0 => "without an end-of-archive mark",
                _ => "within a header",
            };
            return Err(Error::Truncated { position: self.input.position(), missing: missing.to_owned() });
        }
        if block.iter().all(|&b| b == 0) {
            return Ok(None);
        }
        let header = Header::parse(&block).map_err(|reason| self.error(reason))?;
        self.current = header.path();
        Ok(Some((block, header)))
    }

    fn begin_data(&mut self, stored: u64) -> Result<()> {
        let end = self.input.position().checked_add(stored).and_then(|end| end.checked_add(BLOCK_BYTES));
        if end.is_none_or(|end| end > i64::MAX as u64) {
            return Err(self.error(format!("a size of {stored} bytes is out of range")));
        }
        self.data_left = stored;
        self.padding = stored.next_multiple_of(BLOCK_BYTES) - stored;
        Ok(())
    }

    fn skip_data(&mut self) -> Result<()> {
        let left = self.data_left + self.padding;
        if left > 0 {
            let current = String::from_utf8_lossy(&self.current);
            self.input.copy(left, &format!("{current:?}"), |_| Ok(()))?;
        }
        (self.data_left, self.padding) = (0, 0);
        Ok(())
    }

    /// The bytes of an extended header.
    fn extended_data(&mut self, header: &Header, left: &mut u64) -> Result<Vec<u8>> {
        let size = header.size().map_err(|reason| self.error(reason))?;
        if size > *left {
            return Err(self.error(format!("extended headers of more than {EXTENDED_BYTES_MAX} bytes")));
        }
        *left -= size;
        self.begin_data(size)?;
        let mut data = Vec::new();
        self.data(size, |bytes| {
            data.extend_from_slice(bytes);
            Ok(())
        })?;
        self.skip_data()?;
        Ok(data)
    }

    fn member(&mut self, block: &[u8; 512], header: &Header, mut extended: Extended) -> Result<Member> {
        let sparse = std::mem::take(&mut extended.sparse);
        let path = sparse.name.clone().or(extended.path.take()).unwrap_or_else(|| header.path());
        self.current.clone_from(&path);
        let metadata = self.metadata(header, &mut extended)?;
        let link = extended.link.take().unwrap_or_else(|| header.link().to_vec());
        let device = || header.device();
        let is_directory_name = path.ends_with(b"/");
        let kind = match header.kind {
            b'1' => MemberKind::HardLink(link),
            b'2' => MemberKind::Symlink(link),
            b'3' => device().map(|(a, b)| MemberKind::CharacterDevice(a, b)).map_err(|r| self.error(r))?,
            b'4' => device().map(|(a, b)| MemberKind::BlockDevice(a, b)).map_err(|r| self.error(r))?,
            b'5' => MemberKind::Directory,
            b'6' => MemberKind::Fifo,
            // GNU's incremental archives keep a list of names as the directory's data.
            b'D' => {
                self.begin_data(self.stored_size(header, &extended)?)?;
                MemberKind::Directory
            }
            b'S' => self.gnu_sparse(block, header, &extended)?,
            // v7 knows directories by the slash behind their name alone.
            b'0' | 0 if is_directory_name => {
                self.begin_data(self.stored_size(header, &extended)?)?;
                MemberKind::Directory
            }
            // POSIX: what is not known is a regular file.
            _ => self.file(header, &extended, sparse)?,
        };
        Ok(Member { path, kind, metadata })
    }

    fn stored_size(&self, header: &Header, extended: &Extended) -> Result<u64> {
        match extended.size {
            Some(size) => Ok(size),
            None => header.size().map_err(|reason| self.error(reason)),
        }
    }

    fn file(
        &mut self,
        header: &Header,
        extended: &Extended,
        sparse: super::pax::Sparse,
    ) -> Result<MemberKind> {
        let mut stored = self.stored_size(header, extended)?;
        self.begin_data(stored)?;
        let is_map_in_data = sparse.major.is_some_and(|major| major >= 1);
        if let Some(major) = sparse.major.filter(|&major| major > 1) {
            return Err(self.error(format!("sparse format {major} is not known")));
        }
        let segments = if is_map_in_data {
            let before = self.input.position();
            let map = sparse::read_map(stored, &mut self.input)?.map_err(|reason| self.error(reason))?;
            let taken = self.input.position() - before;
            stored -= taken;
            self.data_left -= taken;
            Some(map)
        } else {
            sparse.segments
        };
        let size = sparse.size.unwrap_or(stored);
        match segments {
            Some(segments) => self.sparse_file(segments, size, stored),
            None => Ok(MemberKind::File { size: stored, segments: None }),
        }
    }

    fn gnu_sparse(&mut self, block: &[u8; 512], header: &Header, extended: &Extended) -> Result<MemberKind> {
        let stored = self.stored_size(header, extended)?;
        let map = sparse::read_gnu(block, &mut self.input)?;
        let (segments, size) = map.map_err(|reason| self.error(reason))?;
        self.begin_data(stored)?;
        self.sparse_file(segments, size, stored)
    }

    fn sparse_file(&self, segments: Vec<Segment>, size: u64, stored: u64) -> Result<MemberKind> {
        if size > i64::MAX as u64 {
            return Err(self.error(format!("a size of {size} bytes is out of range")));
        }
        let segments = sparse::check(segments, size, stored).map_err(|reason| self.error(reason))?;
        Ok(MemberKind::File { size, segments: Some(segments) })
    }

    fn metadata(&self, header: &Header, extended: &mut Extended) -> Result<Metadata> {
        let id = |extended: Option<u64>, plain: Result<u64, String>, what: &str| {
            let id = extended.map_or(plain, Ok).map_err(|reason| self.error(reason))?;
            // The largest 32-bit number means "leave it" to chown.
            let id = u32::try_from(id).ok().filter(|&id| id != u32::MAX);
            id.ok_or_else(|| self.error(format!("{what} is out of range")))
        };
        let mtime = match extended.mtime {
            Some(mtime) => mtime,
            None => Time { seconds: header.mtime().map_err(|reason| self.error(reason))?, nanoseconds: 0 },
        };
        Ok(Metadata {
            mode: header.mode().map_err(|reason| self.error(reason))?,
            uid: id(extended.uid, header.uid(), "uid")?,
            gid: id(extended.gid, header.gid(), "gid")?,
            mtime,
            atime: extended.atime,
            ctime: extended.ctime,
            xattrs: std::mem::take(&mut extended.xattrs).into(),
        })
    }
}

/// An error about the entry called `path`.
pub(crate) fn archive_error(path: &[u8], position: u64, reason: String) -> Error {
    let mut entry = String::from_utf8_lossy(&path[..path.len().min(SHOWN_BYTES_MAX)]).into_owned();
    if path.len() > SHOWN_BYTES_MAX {
        entry.push_str("...");
    }
    Error::Archive { entry, position, reason }
}
