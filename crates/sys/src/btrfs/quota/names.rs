//! Where the subvolumes of a filesystem lie, so that groups can be called by paths.

use std::collections::{BTreeMap, HashMap};
use std::ffi::OsStr;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout};

use crate::btrfs::search::{Key, tree_search};
use crate::btrfs::{MAGIC, ROOT_INODE, TOP_LEVEL};
use crate::ioctl::{self, READ, Request, WRITE};
use crate::{Error, Result};

/// The most subvolumes that [`subvolume_paths`] lists.
pub const SUBVOLUMES_MAX: usize = 1 << 20;
const ROOT_TREE: u64 = 1;
const ROOT_BACKREF: u8 = 144;
/// Items asked for in one search: more than fit an answer.
const SEARCH_ITEMS: u32 = 4096;
/// Bytes of `struct btrfs_root_ref`, before the name: directory, index, length of the name.
const ROOT_REF_SIZE: usize = 18;
/// Ids of subvolumes end here.
const LAST_SUBVOLUME: u64 = 256u64.wrapping_neg();

/// `struct btrfs_ioctl_ino_lookup_args`.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct InoLookupArgs {
    treeid: u64,
    objectid: u64,
    name: [u8; 4080],
}

const _: () = assert!(size_of::<InoLookupArgs>() == 4096);

const INO_LOOKUP: Request<InoLookupArgs> = Request::sized("BTRFS_IOC_INO_LOOKUP", READ | WRITE, MAGIC, 18);

/// Where a subvolume lies: in which other, in which of its directories, and its name there.
struct Place {
    parent: u64,
    directory: u64,
    name: Vec<u8>,
}

/// The paths of all subvolumes of the filesystem that `file` lies in, from the top level on and without a leading slash;
/// that of the top level itself is empty. Deleted ones that are not yet gone are left out.
///
/// # Errors
/// `EPERM` without CAP_SYS_ADMIN; `EFBIG` when there are more than a million.
pub fn subvolume_paths(file: impl AsFd) -> Result<BTreeMap<u64, PathBuf>> {
    let places = places(&file)?;
    let mut directories: HashMap<(u64, u64), PathBuf> = HashMap::new();
    let mut paths = BTreeMap::from([(TOP_LEVEL, PathBuf::new())]);
    for &id in places.keys() {
        // From this subvolume up to one whose path is known, then down again.
        let mut chain = Vec::new();
        let mut current = id;
        while !paths.contains_key(&current) && chain.len() <= places.len() {
            let Some(place) = places.get(&current) else { break };
            chain.push(current);
            current = place.parent;
        }
        let Some(mut path) = paths.get(&current).cloned() else { continue };
        for id in chain.into_iter().rev() {
            let Some(place) = places.get(&id) else { break };
            let directory = match directories.get(&(place.parent, place.directory)) {
                Some(directory) => directory.clone(),
                None => {
                    let Some(directory) = directory_path(&file, place)? else { break };
                    directories.insert((place.parent, place.directory), directory.clone());
                    directory
                }
            };
            path = path.join(directory).join(OsStr::from_bytes(&place.name));
            paths.insert(id, path.clone());
        }
    }
    Ok(paths)
}

fn places(file: &impl AsFd) -> Result<BTreeMap<u64, Place>> {
    let mut places = BTreeMap::new();
    let mut first = Key { objectid: ROOT_INODE, kind: ROOT_BACKREF, offset: 0 };
    let last = Key { objectid: LAST_SUBVOLUME, kind: ROOT_BACKREF, offset: u64::MAX };
    loop {
        let items = tree_search(file, ROOT_TREE, first, last, SEARCH_ITEMS)?;
        let Some(end) = items.last().map(|item| item.key) else { return Ok(places) };
        for item in items.iter().filter(|item| item.key.kind == ROOT_BACKREF) {
            if let Some(place) = parse_place(item.key, &item.bytes) {
                places.insert(item.key.objectid, place);
            }
        }
        if places.len() > SUBVOLUMES_MAX {
            let error = std::io::Error::from_raw_os_error(libc::EFBIG);
            return Err(Error::new("BTRFS_IOC_TREE_SEARCH", ioctl::describe(file.as_fd()), error));
        }
        match end.successor() {
            Some(next) => first = next,
            None => return Ok(places),
        }
    }
}

fn parse_place(key: Key, item: &[u8]) -> Option<Place> {
    let (directory, _) = item.split_first_chunk()?;
    let name = item.get(ROOT_REF_SIZE..)?.to_vec();
    Some(Place { parent: key.offset, directory: u64::from_le_bytes(*directory), name })
}

/// The path of the directory that a subvolume lies in, within the subvolume around it. `None` when it has gone meanwhile.
fn directory_path(file: &impl AsFd, place: &Place) -> Result<Option<PathBuf>> {
    if place.directory == ROOT_INODE {
        return Ok(Some(PathBuf::new()));
    }
    let mut arguments = InoLookupArgs::new_zeroed();
    (arguments.treeid, arguments.objectid) = (place.parent, place.directory);
    let describe = || format!("inode {} of {}", place.directory, ioctl::describe(file.as_fd()));
    match INO_LOOKUP.call(file.as_fd(), &mut arguments, describe) {
        Err(error) if error.errno() == Some(libc::ENOENT) => return Ok(None),
        result => result?,
    };
    let path = arguments.name.split(|&byte| byte == 0).next().unwrap_or_default();
    Ok(Some(Path::new(OsStr::from_bytes(path)).to_path_buf()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_is_cut_from_its_item() {
        let key = Key { objectid: 300, kind: ROOT_BACKREF, offset: 256 };
        let mut item = vec![0; ROOT_REF_SIZE];
        item[..8].copy_from_slice(&257u64.to_le_bytes());
        item.extend(b"name");
        let place = parse_place(key, &item).expect("whole");
        assert_eq!((place.parent, place.directory, place.name.as_slice()), (256, 257, &b"name"[..]));
        assert!(parse_place(key, &item[..17]).is_none(), "torn");
    }
}
