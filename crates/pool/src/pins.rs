//! Which parts of an image's content some paths of it are.

use std::collections::HashSet;
use std::ops::Range;

use loam_image::{EntryKind, Index};

use crate::error::{Context, Error, Result};

/// The runs of the content that hold the files at and below `paths`, ascending and apart, and their bytes; all of it when
/// there are no paths. Paths are relative to the image's root; a leading slash is ignored.
pub(crate) fn ranges_of(index: &Index, paths: &[String]) -> Result<(Vec<Range<u64>>, u64)> {
    if paths.is_empty() {
        let whole = 0..index.content_length();
        return Ok((vec![whole], index.content_length()));
    }
    let mut wanted: Vec<Wanted> = paths.iter().map(|path| Wanted::new(path)).collect();
    // Of every directory: how many parts of which wanted path it has matched; all parts means that it is wanted whole.
    let mut directories: Vec<Vec<(usize, usize)>> = Vec::new();
    let mut links = HashSet::new();
    let mut ranges = Vec::new();
    for entry in index.entries() {
        let entry = entry.step(|| "index".to_owned())?;
        let matched: Vec<(usize, usize)> = match directories.get(entry.parent as usize) {
            Some(parent) if entry.number != 0 => parent
                .iter()
                .filter_map(|&(path, depth)| wanted[path].step(path, depth, &entry.name))
                .collect(),
            _ => (0..wanted.len()).map(|path| (path, 0)).collect(),
        };
        let whole = matched.iter().any(|&(path, depth)| wanted[path].complete(depth));
        if whole {
            matched.iter().for_each(|&(path, depth)| wanted[path].found |= wanted[path].complete(depth));
            match &entry.kind {
                EntryKind::File { runs, .. } => {
                    ranges.extend(runs.iter().map(|run| run.address..run.address + run.length));
                }
                EntryKind::HardLink(target) => drop(links.insert(*target)),
                _ => {}
            }
        }
        directories.push(if matches!(entry.kind, EntryKind::Directory) { matched } else { Vec::new() });
    }
    if let Some(missing) = wanted.iter().find(|path| !path.found) {
        return Err(Error::NotFound { kind: "path in the image", name: missing.text.clone() });
    }
    add_link_targets(index, &links, &mut ranges)?;
    ranges.sort_by_key(|range| range.start);
    ranges.dedup();
    let bytes = ranges.iter().map(|range| range.end - range.start).sum();
    Ok((ranges, bytes))
}

/// A path that was asked for.
struct Wanted {
    text: String,
    parts: Vec<Vec<u8>>,
    found: bool,
}

impl Wanted {
    fn new(text: &str) -> Self {
        let parts = text.split('/').filter(|part| !part.is_empty() && *part != ".");
        Wanted {
            text: text.to_owned(),
            parts: parts.map(|part| part.as_bytes().to_vec()).collect(),
            found: false,
        }
    }

    fn complete(&self, depth: usize) -> bool {
        depth == self.parts.len()
    }

    /// What an entry `name` matches in a directory that matched `depth` parts.
    fn step(&self, path: usize, depth: usize, name: &[u8]) -> Option<(usize, usize)> {
        match self.parts.get(depth) {
            None => Some((path, depth)),
            Some(part) => (part == name).then_some((path, depth + 1)),
        }
    }
}

/// A wanted hard link may name an inode whose first name is not wanted.
fn add_link_targets(index: &Index, links: &HashSet<u32>, ranges: &mut Vec<Range<u64>>) -> Result<()> {
    if links.is_empty() {
        return Ok(());
    }
    for entry in index.entries() {
        let entry = entry.step(|| "index".to_owned())?;
        if let (true, EntryKind::File { runs, .. }) = (links.contains(&entry.number), &entry.kind) {
            ranges.extend(runs.iter().map(|run| run.address..run.address + run.length));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `a/one`, `a/two` and `b`, 4096 bytes each, and the hard link `c` to `a/one`.
    fn index() -> Index {
        let directory = tempfile::tempdir().unwrap();
        let root = directory.path();
        std::fs::create_dir(root.join("a")).unwrap();
        for name in ["a/one", "a/two", "b"] {
            std::fs::write(root.join(name), [7; 4096]).unwrap();
        }
        std::fs::hard_link(root.join("a/one"), root.join("c")).unwrap();
        let source: loam_image::SourceSpec = format!("dir:{}", root.display()).parse().unwrap();
        let options = loam_image::BuildOptions::default();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let built = runtime.block_on(loam_image::build(&source, &options, None)).unwrap();
        Index::open(built.index).unwrap()
    }

    fn pinned(index: &Index, paths: &[&str]) -> (Vec<Range<u64>>, u64) {
        let paths: Vec<String> = paths.iter().map(|path| (*path).to_owned()).collect();
        ranges_of(index, &paths).unwrap()
    }

    #[test]
    fn paths_are_files_directories_and_links() {
        let index = index();
        assert_eq!(pinned(&index, &[]).1, index.content_length());
        assert_eq!(pinned(&index, &["/"]).1, 3 * 4096, "the root is everything");
        assert_eq!(pinned(&index, &["a/"]).1, 2 * 4096);
        assert_eq!(pinned(&index, &["/a/one"]), pinned(&index, &["c"]), "two names of one file");
        assert_eq!(pinned(&index, &["a/one", "c", "./a"]).1, 2 * 4096, "nothing counts twice");
        let (ranges, _) = pinned(&index, &["b", "a"]);
        assert!(ranges.windows(2).all(|pair| pair[0].end <= pair[1].start), "{ranges:?}");
    }

    #[test]
    fn a_path_that_is_not_there_is_named() {
        let error = ranges_of(&index(), &["a".to_owned(), "a/three".to_owned()]).unwrap_err();
        assert!(matches!(&error, Error::NotFound { name, .. } if name == "a/three"), "{error}");
    }
}
