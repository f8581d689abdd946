//! What the tests of this crate share: building an image, and reading it back as a flat model that can be compared.

#![allow(dead_code, unreachable_pub, reason = "each test binary uses its own part")]

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Mutex};

use loam_content::{ByteSource, Digest, FileSource, collect_chunks};
use loam_image::{
    BuildOptions, Built, ChunkSink, EntryKind, ImageSource, Index, Metadata, Result, SourceSpec, build,
};

/// A tree, flat: path to what is there.
pub type Model = BTreeMap<Vec<u8>, Item>;

/// One name of a model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Item {
    pub kind: Kind,
    /// The first path, in path order, of the same inode.
    pub first_name: Vec<u8>,
    pub metadata: Metadata,
}

/// What is there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kind {
    Directory,
    File(Vec<u8>),
    Symlink(Vec<u8>),
    Character(u32, u32),
    Block(u32, u32),
    Fifo,
    Socket,
}

pub fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
}

pub fn tar_spec(path: &Path) -> SourceSpec {
    format!("tar:{}", path.display()).parse().unwrap()
}

pub fn dir_spec(path: &Path) -> SourceSpec {
    format!("dir:{}", path.display()).parse().unwrap()
}

pub fn build_with(spec: &SourceSpec, options: &BuildOptions) -> Result<Built> {
    runtime().block_on(build(spec, options, None))
}

/// Builds an image of archive bytes.
pub fn build_bytes(archive: &[u8]) -> Result<Built> {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("archive.tar");
    std::fs::write(&path, archive).unwrap();
    build_with(&tar_spec(&path), &BuildOptions::default())
}

/// The error of an archive that must be refused.
pub fn refused(archive: &[u8]) -> String {
    match build_bytes(archive) {
        Ok(built) => panic!("accepted: {:?}", built.report),
        Err(error) => error.to_string(),
    }
}

/// A sink that keeps every chunk.
#[derive(Clone, Default)]
pub struct Keep(pub Arc<Mutex<Vec<Vec<u8>>>>);

impl ChunkSink for Keep {
    fn chunk(&mut self, number: u64, bytes: &[u8]) -> Result<(), loam_content::Error> {
        let mut chunks = self.0.lock().unwrap();
        assert_eq!(number, chunks.len() as u64);
        chunks.push(bytes.to_vec());
        Ok(())
    }
}

/// The chunk source of a built image.
pub fn source(spec: &SourceSpec, index: &Index) -> ImageSource {
    let index = Arc::new(index.clone());
    match spec {
        SourceSpec::Directory(path) => ImageSource::directory(index, path).unwrap(),
        SourceSpec::Tar(url) => {
            let bytes = FileSource::open(url.as_path().unwrap(), None).unwrap();
            ImageSource::archive(index, Arc::new(bytes) as Arc<dyn ByteSource>).unwrap()
        }
    }
}

/// The whole content through the chunk source, every digest checked.
pub fn content(spec: &SourceSpec, index: &Index) -> Vec<u8> {
    if index.chunk_count() == 0 {
        return Vec::new();
    }
    let source = source(spec, index);
    let chunks = runtime().block_on(collect_chunks(&source, 0, index.chunk_count())).unwrap();
    for (number, chunk) in chunks.iter().enumerate() {
        assert_eq!(index.chunk_digest(number as u64), Some(Digest::of(chunk)), "chunk {number}");
    }
    let content = chunks.concat();
    assert_eq!(content.len() as u64, index.content_length());
    content
}

/// Reads an index and its content into a model.
pub fn model(index: &Index, content: &[u8]) -> Model {
    let mut items: Vec<(Vec<u8>, Kind, Metadata, u32)> = Vec::new();
    for entry in index.entries() {
        let entry = entry.unwrap();
        let mut path = match entry.depth {
            0 | 1 => Vec::new(),
            _ => [&items[entry.parent as usize].0[..], b"/"].concat(),
        };
        path.extend_from_slice(&entry.name);
        let mut inode = entry.number;
        let mut metadata = entry.metadata.clone();
        let kind = match &entry.kind {
            EntryKind::Directory => Kind::Directory,
            EntryKind::File { size, runs } => {
                let mut data = vec![0; usize::try_from(*size).unwrap()];
                for run in runs {
                    assert!(run.address % 4096 == 0 && run.file_offset % 4096 == 0 && run.length % 4096 == 0);
                    let from = &content[run.address as usize..][..run.length as usize];
                    let start = run.file_offset as usize;
                    let end = data.len().min(start + from.len());
                    data[start..end].copy_from_slice(&from[..end - start]);
                    assert!(from[end - start..].iter().all(|&b| b == 0), "the tail of a file is not zero");
                }
                Kind::File(data)
            }
            EntryKind::Inline(data) => Kind::File(data.to_vec()),
            EntryKind::Symlink(target) => Kind::Symlink(target.to_vec()),
            EntryKind::HardLink(target) => {
                let target = &items[*target as usize];
                (inode, metadata) = (target.3, target.2.clone());
                target.1.clone()
            }
            EntryKind::CharacterDevice { major, minor } => Kind::Character(*major, *minor),
            EntryKind::BlockDevice { major, minor } => Kind::Block(*major, *minor),
            EntryKind::Fifo => Kind::Fifo,
            EntryKind::Socket => Kind::Socket,
        };
        items.push((path, kind, metadata, inode));
    }
    let mut names: BTreeMap<u32, Vec<u8>> = BTreeMap::new();
    for (path, _, _, inode) in &items {
        let first = names.entry(*inode).or_insert_with(|| path.clone());
        if path < first {
            first.clone_from(path);
        }
    }
    items
        .into_iter()
        .map(|(path, kind, metadata, inode)| {
            (path, Item { kind, first_name: names[&inode].clone(), metadata })
        })
        .collect()
}

/// Builds, reads back and models a source.
pub fn model_of(spec: &SourceSpec, options: &BuildOptions) -> Model {
    let built = build_with(spec, options).unwrap_or_else(|error| panic!("{spec}: {error}"));
    let index = Index::open(built.index).unwrap();
    model(&index, &content(spec, &index))
}

/// The model without what an archive format cannot keep, as `keep` says.
pub fn reduced(mut model: Model, keep: impl Fn(&mut Metadata)) -> Model {
    model.values_mut().for_each(|item| keep(&mut item.metadata));
    model
}

/// A header block as the formats have it, for archives that no program would write.
pub struct Block(pub [u8; 512]);

impl Block {
    pub fn new(name: &[u8], kind: u8, size: u64) -> Self {
        let mut block = [0; 512];
        block[..name.len()].copy_from_slice(name);
        block[100..107].copy_from_slice(b"0000644");
        block[108..115].copy_from_slice(b"0000000");
        block[116..123].copy_from_slice(b"0000000");
        if size < 1 << 33 {
            block[124..135].copy_from_slice(format!("{size:011o}").as_bytes());
        } else {
            block[124] = 0x80;
            block[128..136].copy_from_slice(&size.to_be_bytes());
        }
        block[136..147].copy_from_slice(b"00000000000");
        block[156] = kind;
        block[257..265].copy_from_slice(b"ustar\x0000");
        Block(block)
    }

    pub fn put(mut self, offset: usize, bytes: &[u8]) -> Self {
        self.0[offset..offset + bytes.len()].copy_from_slice(bytes);
        self
    }

    pub fn link(self, target: &[u8]) -> Self {
        self.put(157, target)
    }

    /// The block with its checksum.
    pub fn finish(mut self) -> Vec<u8> {
        self.0[148..156].fill(b' ');
        let sum: u64 = self.0.iter().map(|&b| u64::from(b)).sum();
        self.0[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        self.0.to_vec()
    }
}

/// A member: header, data, padding.
pub fn member(name: &[u8], kind: u8, data: &[u8]) -> Vec<u8> {
    let mut out = Block::new(name, kind, data.len() as u64).finish();
    out.extend_from_slice(data);
    out.resize(out.len().next_multiple_of(512), 0);
    out
}

/// A PAX header with these records.
pub fn pax(kind: u8, records: &[(&str, &[u8])]) -> Vec<u8> {
    let mut data = Vec::new();
    for (key, value) in records {
        let rest = 3 + key.len() + value.len();
        let mut length = rest + rest.to_string().len();
        length = rest + length.to_string().len();
        data.extend_from_slice(format!("{length} {key}=").as_bytes());
        data.extend_from_slice(value);
        data.push(b'\n');
    }
    member(b"pax", kind, &data)
}

/// The end-of-archive mark.
pub const END: [u8; 1024] = [0; 1024];

/// An archive of these parts.
pub fn archive(parts: &[Vec<u8>]) -> Vec<u8> {
    let mut out = parts.concat();
    out.extend_from_slice(&END);
    out
}

/// Bytes that look random but are the same every time.
pub fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..length)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state as u8
        })
        .collect()
}
