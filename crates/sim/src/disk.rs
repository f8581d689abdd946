//! A directory of files on a simulated disk.
//!
//! Every change to a file's bytes or length is volatile until the file is synced, every change of a name until the
//! directory is. When the power goes, each change that was not synced survives or not, independently of the others
//! and of their order; a write survives sector by sector. That is more than file systems do to their users, and no
//! more than POSIX lets them.
//!
//! Operations that change something are numbered from 0. [`SimDisk::crash_at`] makes one of them the last: it is left
//! half done and fails, as does everything after it, until [`SimDisk::power_cycle`] gives the disk that a restarted
//! machine finds. A test that walks all numbers has tried every boundary.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

/// Bytes that a disk writes whole or not at all.
pub const SECTOR: usize = 512;

type FileId = usize;

#[derive(Debug, Clone)]
enum Change {
    Write { offset: usize, data: Vec<u8> },
    Length(usize),
}

impl Change {
    fn apply(&self, bytes: &mut Vec<u8>) {
        match self {
            Change::Length(length) => bytes.resize(*length, 0),
            Change::Write { offset, data } => {
                let end = offset + data.len();
                bytes.resize(bytes.len().max(end), 0);
                bytes[*offset..end].copy_from_slice(data);
            }
        }
    }
}

#[derive(Debug, Default)]
struct Inode {
    durable: Vec<u8>,
    volatile: Vec<u8>,
    pending: Vec<Change>,
}

/// Names that change together: a rename is two.
type NameChange = Vec<(String, Option<FileId>)>;

#[derive(Debug, Default)]
struct State {
    files: Vec<Inode>,
    durable_names: BTreeMap<String, FileId>,
    names: BTreeMap<String, FileId>,
    pending_names: Vec<NameChange>,
    operations: u64,
    crash_at: Option<u64>,
    fail_at: Option<(u64, io::ErrorKind)>,
    capacity: Option<usize>,
}

/// What an operation may do.
enum Verdict {
    Go,
    /// Leave it half done and fail so.
    Fail(io::Error),
}

/// A simulated disk with one directory. Clones are the same disk.
#[derive(Debug, Clone, Default)]
pub struct SimDisk {
    state: Arc<Mutex<State>>,
}

/// An open file of a [`SimDisk`].
#[derive(Debug)]
pub struct SimFile {
    state: Arc<Mutex<State>>,
    id: FileId,
}

fn power_lost() -> io::Error {
    io::Error::other("the simulated power is off")
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

impl State {
    fn is_off(&self) -> bool {
        self.crash_at.is_some_and(|at| self.operations > at)
    }

    fn begin(&mut self) -> io::Result<Verdict> {
        if self.is_off() {
            return Err(power_lost());
        }
        let number = self.operations;
        self.operations += 1;
        if self.crash_at == Some(number) {
            return Ok(Verdict::Fail(power_lost()));
        }
        match self.fail_at {
            Some((at, kind)) if at == number => Ok(Verdict::Fail(kind.into())),
            _ => Ok(Verdict::Go),
        }
    }

    fn change_names(&mut self, change: NameChange) -> io::Result<()> {
        let result = match self.begin()? {
            Verdict::Go => Ok(()),
            // A failed rename may have happened on a disk that lost power, not on one that answers.
            Verdict::Fail(error) if self.is_off() => Err(error),
            Verdict::Fail(error) => return Err(error),
        };
        apply_names(&mut self.names, &change);
        self.pending_names.push(change);
        result
    }

    fn change_file(&mut self, id: FileId, change: Change) {
        let file = &mut self.files[id];
        change.apply(&mut file.volatile);
        file.pending.push(change);
    }

    fn bytes_in_use(&self) -> usize {
        self.names.values().map(|&id| self.files[id].volatile.len()).sum()
    }
}

fn apply_names(names: &mut BTreeMap<String, FileId>, change: &NameChange) {
    for (name, id) in change {
        match id {
            Some(id) => names.insert(name.clone(), *id),
            None => names.remove(name),
        };
    }
}

impl SimDisk {
    /// An empty disk.
    pub fn new() -> Self {
        SimDisk::default()
    }

    /// How many operations that change something there were.
    pub fn operations(&self) -> u64 {
        lock(&self.state).operations
    }

    /// The power goes at operation `number`.
    pub fn crash_at(&self, number: u64) {
        lock(&self.state).crash_at = Some(number);
    }

    /// Undoes the crash as if only the process had been killed: everything that was written is still there, and as
    /// little of it durable as before.
    pub fn revive(&self) {
        lock(&self.state).crash_at = None;
    }

    /// Operation `number` fails; later ones work again. A write that fails is half there. A sync that fails has lost
    /// what it should have made durable, and the next sync will not say so, as on Linux. A sync of names that fails
    /// loses nothing: journaling file systems try again or stop taking changes at all.
    pub fn fail_at(&self, number: u64, kind: io::ErrorKind) {
        lock(&self.state).fail_at = Some((number, kind));
    }

    /// Writes that would make all files together longer than `bytes` fail with `StorageFull`; `None` for no limit.
    pub fn set_capacity(&self, bytes: Option<usize>) {
        lock(&self.state).capacity = bytes;
    }

    /// Inverts the bits of `mask` in byte `offset` of a file, behind everyone's back.
    ///
    /// # Panics
    /// When there is no such byte.
    pub fn corrupt(&self, name: &str, offset: usize, mask: u8) {
        let mut state = lock(&self.state);
        let id = state.names[name];
        let file = &mut state.files[id];
        file.volatile[offset] ^= mask;
        if let Some(byte) = file.durable.get_mut(offset) {
            *byte ^= mask;
        }
    }

    /// The disk after power was lost and came back. Seed 0 has dropped everything that was not synced, seed 1 has
    /// kept all of it, every other seed its own mixture; in some mixtures, lengthened files hold stale bytes where
    /// nothing was written.
    pub fn power_cycle(&self, seed: u64) -> SimDisk {
        let state = lock(&self.state);
        let mut random = StdRng::seed_from_u64(seed);
        let keep = match seed {
            0 => 0.0,
            1 => 1.0,
            _ => [0.1, 0.5, 0.9][random.random_range(0..3)],
        };
        let stale = seed > 1 && random.random_bool(0.25);
        let mut names = state.durable_names.clone();
        for change in &state.pending_names {
            if random.random_bool(keep) {
                apply_names(&mut names, change);
            }
        }
        let files = state.files.iter().map(|file| {
            let bytes = survivors(file, keep, stale, &mut random);
            Inode { durable: bytes.clone(), volatile: bytes, pending: Vec::new() }
        });
        let files = files.collect();
        let state = State { files, durable_names: names.clone(), names, ..State::default() };
        SimDisk { state: Arc::new(Mutex::new(state)) }
    }

    /// Makes an empty file, replacing what has the name.
    ///
    /// # Errors
    /// Those that were asked for.
    pub fn create(&self, name: &str) -> io::Result<SimFile> {
        let mut state = lock(&self.state);
        state.files.push(Inode::default());
        let id = state.files.len() - 1;
        state.change_names(vec![(name.to_owned(), Some(id))])?;
        Ok(SimFile { state: Arc::clone(&self.state), id })
    }

    /// Opens a file.
    ///
    /// # Errors
    /// `NotFound`, and those that were asked for.
    pub fn open(&self, name: &str) -> io::Result<SimFile> {
        let state = lock(&self.state);
        if state.is_off() {
            return Err(power_lost());
        }
        let id = *state.names.get(name).ok_or(io::ErrorKind::NotFound)?;
        Ok(SimFile { state: Arc::clone(&self.state), id })
    }

    /// Gives a file another name, replacing what has it.
    ///
    /// # Errors
    /// `NotFound`, and those that were asked for.
    pub fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        let mut state = lock(&self.state);
        let id = *state.names.get(from).ok_or(io::ErrorKind::NotFound)?;
        state.change_names(vec![(from.to_owned(), None), (to.to_owned(), Some(id))])
    }

    /// Removes a name.
    ///
    /// # Errors
    /// `NotFound`, and those that were asked for.
    pub fn remove(&self, name: &str) -> io::Result<()> {
        let mut state = lock(&self.state);
        if !state.names.contains_key(name) {
            return Err(io::ErrorKind::NotFound.into());
        }
        state.change_names(vec![(name.to_owned(), None)])
    }

    /// The names of all files.
    ///
    /// # Errors
    /// When the power is off.
    pub fn names(&self) -> io::Result<Vec<String>> {
        let state = lock(&self.state);
        if state.is_off() { Err(power_lost()) } else { Ok(state.names.keys().cloned().collect()) }
    }

    /// Makes all names durable.
    ///
    /// # Errors
    /// Those that were asked for.
    pub fn sync_names(&self) -> io::Result<()> {
        let mut state = lock(&self.state);
        match state.begin()? {
            Verdict::Fail(error) => Err(error),
            Verdict::Go => {
                let pending = std::mem::take(&mut state.pending_names);
                pending.iter().for_each(|change| apply_names(&mut state.durable_names, change));
                Ok(())
            }
        }
    }
}

/// The bytes of a file after the power came back.
fn survivors(file: &Inode, keep: f64, stale: bool, random: &mut StdRng) -> Vec<u8> {
    let mut bytes = file.durable.clone();
    for change in &file.pending {
        match change {
            Change::Length(_) => {
                if random.random_bool(keep) {
                    change.apply(&mut bytes);
                }
            }
            Change::Write { offset, data } => {
                let mut at = *offset;
                let end = offset + data.len();
                while at < end {
                    let next = end.min((at / SECTOR + 1) * SECTOR);
                    if random.random_bool(keep) {
                        let old_length = bytes.len();
                        bytes.resize(old_length.max(next), 0);
                        if stale && old_length < at {
                            random.fill(&mut bytes[old_length..at]);
                        }
                        bytes[at..next].copy_from_slice(&data[at - offset..next - offset]);
                    }
                    at = next;
                }
            }
        }
    }
    bytes
}

impl SimFile {
    /// Length in bytes.
    ///
    /// # Errors
    /// When the power is off.
    pub fn length(&self) -> io::Result<u64> {
        self.look(|bytes| Ok(bytes.len() as u64))
    }

    /// Fills `buffer` from `offset`.
    ///
    /// # Errors
    /// `UnexpectedEof`, or when the power is off.
    pub fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        self.look(|bytes| {
            let found = bytes.get(offset as usize..).and_then(|bytes| bytes.get(..buffer.len()));
            buffer.copy_from_slice(found.ok_or(io::ErrorKind::UnexpectedEof)?);
            Ok(())
        })
    }

    /// All bytes of the file.
    ///
    /// # Errors
    /// When the power is off.
    pub fn read_all(&self) -> io::Result<Vec<u8>> {
        self.look(|bytes| Ok(bytes.to_vec()))
    }

    fn look<T>(&self, read: impl FnOnce(&[u8]) -> io::Result<T>) -> io::Result<T> {
        let state = lock(&self.state);
        if state.is_off() { Err(power_lost()) } else { read(&state.files[self.id].volatile) }
    }

    /// Writes `data` at `offset`.
    ///
    /// # Errors
    /// Those that were asked for; then half of the data, or what fits, is there.
    pub fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let mut state = lock(&self.state);
        let offset = offset as usize;
        let mut data = data.to_vec();
        let mut result = Ok(());
        match state.begin()? {
            Verdict::Go => {}
            Verdict::Fail(error) => {
                if !state.is_off() {
                    data.truncate(data.len() / 2);
                }
                result = Err(error);
            }
        }
        let growth = (offset + data.len()).saturating_sub(state.files[self.id].volatile.len());
        let room = state.capacity.map(|capacity| capacity.saturating_sub(state.bytes_in_use()));
        if let Some(room) = room
            && growth > room
        {
            data.truncate(data.len().saturating_sub(growth - room));
            result = result.and(Err(io::ErrorKind::StorageFull.into()));
        }
        state.change_file(self.id, Change::Write { offset, data });
        result
    }

    /// Cuts the file, or lengthens it with zeroes.
    ///
    /// # Errors
    /// Those that were asked for.
    pub fn set_length(&self, length: u64) -> io::Result<()> {
        let mut state = lock(&self.state);
        let verdict = state.begin()?;
        if matches!(verdict, Verdict::Go) || state.is_off() {
            state.change_file(self.id, Change::Length(length as usize));
        }
        match verdict {
            Verdict::Go => Ok(()),
            Verdict::Fail(error) => Err(error),
        }
    }

    /// Makes bytes and length durable.
    ///
    /// # Errors
    /// Those that were asked for.
    pub fn sync(&self) -> io::Result<()> {
        let mut state = lock(&self.state);
        let verdict = state.begin()?;
        if state.is_off() {
            return Err(power_lost());
        }
        let file = &mut state.files[self.id];
        let pending = std::mem::take(&mut file.pending);
        match verdict {
            Verdict::Fail(error) => Err(error),
            Verdict::Go => {
                pending.iter().for_each(|change| change.apply(&mut file.durable));
                Ok(())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(disk: &SimDisk, name: &str) -> Option<Vec<u8>> {
        disk.open(name).ok().map(|file| file.read_all().expect("read"))
    }

    fn synced(name: &str, bytes: &[u8]) -> SimDisk {
        let disk = SimDisk::new();
        let file = disk.create(name).expect("create");
        file.write_at(0, bytes).expect("write");
        file.sync().expect("sync");
        disk.sync_names().expect("sync");
        disk
    }

    #[test]
    fn what_was_synced_survives_and_nothing_else_need() {
        let disk = synced("a", b"durable");
        disk.open("a").expect("open").write_at(0, b"changed").expect("write");
        disk.create("b").expect("create").sync().expect("sync");
        let dropped = disk.power_cycle(0);
        assert_eq!(read(&dropped, "a").as_deref(), Some(&b"durable"[..]));
        assert_eq!(read(&dropped, "b"), None);
        let kept = disk.power_cycle(1);
        assert_eq!(read(&kept, "a").as_deref(), Some(&b"changed"[..]));
        assert_eq!(read(&kept, "b").as_deref(), Some(&b""[..]));
    }

    #[test]
    fn writes_are_torn_at_sectors() {
        let disk = synced("a", &[0; 8 * SECTOR]);
        disk.open("a").expect("open").write_at(0, &[1; 8 * SECTOR]).expect("write");
        let mut torn = 0;
        for seed in 2..40 {
            let bytes = read(&disk.power_cycle(seed), "a").expect("file");
            let sectors: Vec<_> = bytes.chunks(SECTOR).collect();
            assert!(sectors.iter().all(|s| s.iter().all(|b| *b == s[0])), "seed {seed}");
            torn += u32::from(sectors.iter().any(|s| s[0] != sectors[0][0]));
        }
        assert!(torn > 10);
    }

    #[test]
    fn everything_fails_from_the_crash_on() {
        let disk = synced("a", b"x");
        disk.crash_at(disk.operations());
        let file = disk.open("a").expect("still on");
        assert!(file.write_at(0, b"y").is_err());
        assert!(file.sync().is_err() && disk.open("a").is_err() && disk.names().is_err());
        assert_eq!(read(&disk.power_cycle(0), "a").as_deref(), Some(&b"x"[..]));
    }

    #[test]
    fn a_failed_sync_loses_bytes_and_the_next_does_not_tell() {
        let disk = synced("a", b"x");
        let file = disk.open("a").expect("open");
        file.write_at(0, b"y").expect("write");
        disk.fail_at(disk.operations(), io::ErrorKind::Other);
        assert!(file.sync().is_err());
        file.sync().expect("no further error");
        assert_eq!(file.read_all().expect("read"), b"y");
        assert_eq!(read(&disk.power_cycle(1), "a").as_deref(), Some(&b"x"[..]));
    }

    #[test]
    fn a_full_disk_takes_what_fits() {
        let disk = synced("a", b"x");
        disk.set_capacity(Some(3));
        let file = disk.open("a").expect("open");
        let error = file.write_at(1, b"abcd").expect_err("full");
        assert_eq!(error.kind(), io::ErrorKind::StorageFull);
        assert_eq!(file.read_all().expect("read"), b"xab");
    }
}
