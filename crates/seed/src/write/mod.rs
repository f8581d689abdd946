//! The formatter: decides where everything lies, then writes each tree once.
//!
//! Order of work: the subvolumes' trees are streamed out, which yields the back references; then the small trees;
//! then everything that describes space is counted, which fixes the length of the METADATA chunk; then the device,
//! free space, extent and root trees follow, in this order, and last the chunk tree and the superblocks.

mod extents;
mod fs_tree;
mod links;
mod refs;
mod small;
mod store;
mod superblocks;
mod top_level;

use crate::builder::{BlockIdentity, ItemSink, LeafCounter, Root, TreeBuilder, fan_out, levels_in_order};
use crate::disk::{SUPER_SIZE, flag, object};
use crate::identity::Identity;
use crate::label::{LABEL_OFFSET, Label};
use crate::options::{METADATA_BASE, METADATA_END, SYSTEM_BASE};
use crate::{Attributes, Error, Image, Layout, Result, SeedOptions, Subvolume};

use extents::Census;
use fs_tree::FsTreeWriter;
use links::check_name;
use refs::DataRefs;
use small::Chunk;
use store::{BlockStore, write_image};
pub use top_level::{VIRTUAL_DATA_INODE, VIRTUAL_DATA_NAME};

const MEBIBYTE: u64 = 1 << 20;
/// The SYSTEM chunk has twice what the chunk tree needs and this, so that the kernel can rewrite and extend it.
const SYSTEM_SPARE: u64 = 4 * MEBIBYTE;
/// A local METADATA chunk has a quarter more than needed and this, so that the kernel need not allocate another at
/// once.
const METADATA_SPARE: u64 = 64 * MEBIBYTE;
/// The smallest local METADATA chunk.
const METADATA_MIN: u64 = 256 * MEBIBYTE;
/// What a local METADATA chunk must have free for the kernel to commit its first transaction.
const METADATA_FREE_MIN: u64 = 16 * MEBIBYTE;

/// Chunks of trees; they come before those of the virtual region.
const TREE_CHUNKS: usize = 2;
/// The trees that describe space and that the root tree lists.
const SPACE_TREES: [u64; 3] = [object::EXTENT_TREE, object::DEV_TREE, object::FREE_SPACE_TREE];

/// What was written.
#[derive(Debug, Clone)]
pub struct Report {
    /// UUID of the file system to be mounted.
    pub fsid: [u8; 16],
    /// UUID that the virtual device goes by: for a pair that of the seed, else the same as `fsid`.
    pub virtual_fsid: [u8; 16],
    /// The superblock at 64 KiB of the virtual device: for a pair all that there is on it.
    pub virtual_superblock: Box<[u8; SUPER_SIZE]>,
    /// Ids of the subvolumes, in the order in which they were given.
    pub subvolume_ids: Vec<u64>,
    /// Bytes of tree blocks.
    pub metadata_bytes: u64,
    /// Data chunks of the virtual region.
    pub data_chunks: u64,
    /// Why current kernels refuse the image, if they do.
    pub kernel_limit: Option<String>,
}

/// Formats an image. `local` is for [`Layout::Pair`] and no other layout.
///
/// Memory: 12 bytes for each node of the largest tree and 40 for each run of a file, nothing else that grows.
///
/// # Errors
/// Options or trees that break a rule, a `local` image that does not go with the layout, trees that do not fit, and
/// whatever the images return. After an error other than of options or subvolumes' names the images' content is
/// unspecified.
pub fn write(
    options: &SeedOptions,
    subvolumes: &[Subvolume<'_>],
    virtual_image: &mut dyn Image,
    local: Option<&mut dyn Image>,
) -> Result<Report> {
    options.validate()?;
    check_subvolumes(subvolumes)?;
    let size = options.virtual_device_size();
    match (options.layout, local) {
        (Layout::Pair, Some(local)) => {
            set_length(virtual_image, "virtual", size)?;
            set_length(local, "local", options.local_size)?;
            let formatted = format(options, subvolumes, local, "local", options.local_size)?;
            write_image(local, "local", LABEL_OFFSET, &Label::of(options).to_block())?;
            superblocks::write(&formatted.superblock, local, "local", options.local_size)?;
            superblocks::write_first(&formatted.report.virtual_superblock[..], virtual_image, "virtual")?;
            Ok(formatted.report)
        }
        (Layout::Single | Layout::MegaExtent, None) => {
            set_length(virtual_image, "virtual", size)?;
            let formatted = format(options, subvolumes, virtual_image, "virtual", crate::VIRTUAL_BASE)?;
            superblocks::write(&formatted.superblock, virtual_image, "virtual", size)?;
            Ok(formatted.report)
        }
        (Layout::Pair, None) => Err(image_option(0, "layout pair needs a local image for the trees")),
        (_, Some(_)) => Err(image_option(1, "only layout pair takes a local image")),
    }
}

fn image_option(value: u64, reason: &str) -> Error {
    Error::Option { option: "local images", value, reason: reason.to_owned() }
}

fn set_length(image: &mut dyn Image, device: &'static str, length: u64) -> Result<()> {
    let context = |source| Error::Io { operation: "extension", device, offset: 0, length, source };
    image.set_length(length).map_err(context)
}

fn check_subvolumes(subvolumes: &[Subvolume<'_>]) -> Result<()> {
    let mut names: Vec<&str> = subvolumes.iter().map(|subvolume| subvolume.name).collect();
    let refuse = |name: &str, reason: String| Err(Error::Subvolume { name: name.to_owned(), reason });
    for name in &names {
        if let Err(reason) = check_name(name.as_bytes()) {
            return refuse(name, reason);
        }
        if *name == VIRTUAL_DATA_NAME {
            return refuse(name, "this is the name of the file that spans the virtual region".to_owned());
        }
    }
    names.sort_unstable();
    match names.windows(2).find(|pair| pair[0] == pair[1]) {
        Some(pair) => refuse(pair[0], "there is another of this name".to_owned()),
        None => Ok(()),
    }
}

/// Everything that is decided before or while writing and that several trees state.
pub(crate) struct Plan<'a> {
    options: &'a SeedOptions,
    subvolumes: &'a [Subvolume<'a>],
    identity: Identity,
    system_length: u64,
    system_used: u64,
    metadata_length: u64,
    metadata_used: u64,
}

impl<'a> Plan<'a> {
    fn new(options: &'a SeedOptions, subvolumes: &'a [Subvolume<'a>]) -> Self {
        Plan {
            options,
            subvolumes,
            identity: Identity::new(&options.identity, options.seed_identity_of_pair()),
            system_length: 0,
            system_used: 0,
            metadata_length: u64::from(options.node_size),
            metadata_used: 0,
        }
    }

    /// The device that carries the trees.
    fn tree_devid(&self) -> u64 {
        self.devids().end - 1
    }

    fn devids(&self) -> std::ops::Range<u64> {
        if self.options.layout == Layout::Pair { 1..3 } else { 1..2 }
    }

    /// All chunks in order of their logical address.
    fn chunks(&self) -> impl Iterator<Item = Chunk> + '_ {
        let pair = self.options.layout == Layout::Pair;
        let device_uuid = if pair { self.identity.local_device } else { self.identity.virtual_device };
        let system = Chunk {
            start: SYSTEM_BASE,
            length: self.system_length,
            kind: flag::GROUP_SYSTEM,
            used: self.system_used,
            devid: self.tree_devid(),
            device_uuid,
        };
        let metadata = Chunk {
            start: METADATA_BASE,
            length: self.metadata_length,
            kind: flag::GROUP_METADATA,
            used: self.metadata_used,
            ..system
        };
        let data = self.options.data_chunks().map(move |(start, length)| Chunk {
            start,
            length,
            kind: flag::GROUP_DATA,
            used: length,
            devid: 1,
            device_uuid: self.identity.virtual_device,
        });
        [system, metadata].into_iter().chain(data)
    }

    fn subvolume_id(&self, position: usize) -> u64 {
        object::FIRST_FREE + position as u64
    }

    fn subvolume_position(&self, id: u64) -> Option<usize> {
        let position = id.checked_sub(object::FIRST_FREE)? as usize;
        (position < self.subvolumes.len()).then_some(position)
    }

    fn subvolume_uuid(&self, id: u64) -> [u8; 16] {
        let name = self.subvolume_position(id).map_or("", |position| self.subvolumes[position].name);
        self.identity.subvolume(name)
    }

    /// Id and UUID of all subvolumes, the top-level one first.
    fn subvolume_uuids(&self) -> impl Iterator<Item = (u64, [u8; 16])> + '_ {
        let ids = (0..self.subvolumes.len()).map(|position| self.subvolume_id(position));
        std::iter::once(object::FS_TREE).chain(ids).map(|id| (id, self.subvolume_uuid(id)))
    }

    fn directory_attributes(&self) -> Attributes {
        let now = self.options.timestamp;
        Attributes { uid: 0, gid: 0, mode: 0o755, atime: now, mtime: now, ctime: now }
    }
}

/// A formatted tree image that lacks its superblocks.
struct Formatted {
    superblock: Box<crate::disk::SuperBlock>,
    report: Report,
}

fn format(
    options: &SeedOptions,
    subvolumes: &[Subvolume<'_>],
    image: &mut dyn Image,
    device: &'static str,
    end: u64,
) -> Result<Formatted> {
    let mut plan = Plan::new(options, subvolumes);
    let identity = plan.identity;
    let mut writer = Writer {
        blocks: BlockStore::new(image, device, end),
        node_size: options.node_size,
        identity: BlockIdentity { fsid: identity.fsid, chunk_tree_uuid: identity.chunk_tree },
        roots: Vec::new(),
    };
    let refs = write_subvolumes(&plan, &mut writer)?;
    writer.tree(object::DATA_RELOC_TREE, |sink| small::data_reloc_tree(&plan, sink))?;
    writer.tree(object::CSUM_TREE, |_| Ok(()))?;
    writer.tree(object::UUID_TREE, |sink| small::uuid_tree(&plan, sink))?;
    if options.simple_quota {
        writer.tree(object::QUOTA_TREE, |sink| small::quota_tree(&plan, sink))?;
    }
    let [chunk_root, root_tree] = write_space_trees(&mut plan, &mut writer, &refs, end)?;
    writer.blocks.flush()?;
    let (superblock, virtual_superblock) = superblocks::compose(&plan, root_tree, chunk_root);
    let report = Report {
        fsid: identity.fsid,
        virtual_fsid: virtual_superblock.fsid,
        virtual_superblock: superblocks::to_bytes(&virtual_superblock),
        subvolume_ids: (0..subvolumes.len()).map(|position| plan.subvolume_id(position)).collect(),
        metadata_bytes: plan.metadata_used + plan.system_used,
        data_chunks: options.data_chunks().len() as u64,
        kernel_limit: options.layout.kernel_limit(options.virtual_size),
    };
    Ok(Formatted { superblock, report })
}

fn write_subvolumes(plan: &Plan<'_>, writer: &mut Writer<'_>) -> Result<DataRefs> {
    let mut refs = DataRefs::default();
    writer.tree(object::FS_TREE, |sink| top_level::top_level(plan, sink))?;
    for (position, subvolume) in plan.subvolumes.iter().enumerate() {
        let root = plan.subvolume_id(position);
        let mut fs_tree = FsTreeWriter {
            options: plan.options,
            name: subvolume.name,
            root,
            tree: subvolume.tree,
            refs: &mut refs,
        };
        writer.tree(root, |sink| fs_tree.write(sink))?;
    }
    refs.seal();
    Ok(refs)
}

/// Counts, then writes, the trees that describe space, and returns the roots of chunk tree and root tree.
fn write_space_trees(
    plan: &mut Plan<'_>,
    writer: &mut Writer<'_>,
    refs: &DataRefs,
    end: u64,
) -> Result<[Root; 2]> {
    let node_size = plan.options.node_size;
    let chunk_tree = plan_system_chunk(plan)?;

    let dev_tree = count(node_size, |sink| small::dev_tree(plan, sink))?;
    let free_space_tree = count(node_size, |sink| small::free_space_tree(plan, sink))?;
    let mut roots = writer.roots.clone();
    let unknown = Root { bytenr: 0, level: 0, blocks: 0 };
    roots.extend(SPACE_TREES.map(|id| (id, unknown)));
    roots.sort_unstable_by_key(|(id, _)| *id);
    let root_tree = count(node_size, |sink| small::root_tree(plan, &roots, sink))?;

    let mut census = Census {
        system: (object::CHUNK_TREE, chunk_tree),
        metadata: writer.blocks.metadata.trees().to_vec(),
    };
    census.metadata.extend([(object::DEV_TREE, dev_tree), (object::FREE_SPACE_TREE, free_space_tree)]);
    census.add_own(plan, (object::ROOT_TREE, root_tree), refs)?;
    plan.metadata_used = census.metadata_blocks() * u64::from(node_size);
    plan.metadata_length = metadata_length(plan, end)?;
    let devices = superblocks::device_items(plan);

    writer.tree(object::DEV_TREE, |sink| small::dev_tree(plan, sink))?;
    writer.tree(object::FREE_SPACE_TREE, |sink| small::free_space_tree(plan, sink))?;
    writer.tree(object::EXTENT_TREE, |sink| extents::extent_tree(plan, &census, refs, sink))?;
    writer.roots.sort_unstable_by_key(|(id, _)| *id);
    let roots = writer.roots.clone();
    let root_tree = writer.tree(object::ROOT_TREE, |sink| small::root_tree(plan, &roots, sink))?;
    let chunk_tree = writer.tree(object::CHUNK_TREE, |sink| small::chunk_tree(plan, &devices, sink))?;
    if writer.blocks.metadata.trees() != census.metadata || writer.blocks.system.trees() != [census.system] {
        return Err(Error::Inconsistent("trees take other blocks than were counted".to_owned()));
    }
    Ok([chunk_tree, root_tree])
}

/// Counts the chunk tree, which sets the SYSTEM chunk's length, and returns the levels of its blocks.
fn plan_system_chunk(plan: &mut Plan<'_>) -> Result<Vec<u8>> {
    let node_size = plan.options.node_size;
    let devices = superblocks::device_items(plan);
    let levels = count(node_size, |sink| small::chunk_tree(plan, &devices, sink))?;
    plan.system_used = levels.len() as u64 * u64::from(node_size);
    plan.system_length = (2 * plan.system_used + SYSTEM_SPARE).next_multiple_of(MEBIBYTE);
    Ok(levels)
}

/// The superblock at 64 KiB of the virtual device of a pair, which is all that there is below the virtual region. It
/// depends on the options alone, so it can be had without formatting anything.
///
/// # Errors
/// [`Error::Option`] for options out of range, and for another layout.
pub fn virtual_superblock(options: &SeedOptions) -> Result<Box<[u8; SUPER_SIZE]>> {
    options.validate()?;
    if options.layout != Layout::Pair {
        return Err(image_option(0, "only the virtual device of layout pair is nothing but a superblock"));
    }
    let mut plan = Plan::new(options, &[]);
    plan_system_chunk(&mut plan)?;
    let unknown = Root { bytenr: 0, level: 0, blocks: 0 };
    let (_, seed) = superblocks::compose(&plan, unknown, unknown);
    Ok(superblocks::to_bytes(&seed))
}

/// The length of the METADATA chunk, whose use is known.
fn metadata_length(plan: &Plan<'_>, end: u64) -> Result<u64> {
    let used = plan.metadata_used;
    if plan.options.layout != Layout::Pair {
        // Nobody ever writes to a seed, so there is no need of free space.
        return Ok((used + 1).next_multiple_of(MEBIBYTE));
    }
    let room = end.min(METADATA_END) - METADATA_BASE;
    let wanted = (used + used / 4 + METADATA_SPARE).max(METADATA_MIN);
    // On a small device leave room for data.
    let length = wanted.min(room / 4 * 3) / MEBIBYTE * MEBIBYTE;
    if length < used + METADATA_FREE_MIN {
        return Err(Error::NoRoom {
            device: "local",
            needed: METADATA_BASE + (used + METADATA_FREE_MIN + MEBIBYTE) / 3 * 4,
            available: end,
            hint: "make the local device larger, or pre-clone fewer files",
        });
    }
    Ok(length)
}

/// Levels of the blocks of the tree that `items` makes.
fn count(node_size: u32, items: impl FnOnce(&mut dyn ItemSink) -> Result<()>) -> Result<Vec<u8>> {
    let mut counter = LeafCounter::new(node_size);
    items(&mut counter)?;
    Ok(levels_in_order(counter.leaves(), fan_out(node_size)))
}

/// Writes trees and remembers their roots.
struct Writer<'a> {
    blocks: BlockStore<'a>,
    node_size: u32,
    identity: BlockIdentity,
    /// Roots of the trees that the root tree lists.
    roots: Vec<(u64, Root)>,
}

impl Writer<'_> {
    fn tree(&mut self, id: u64, items: impl FnOnce(&mut dyn ItemSink) -> Result<()>) -> Result<Root> {
        let mut builder = TreeBuilder::new(id, self.node_size, self.identity, &mut self.blocks);
        items(&mut builder)?;
        let root = builder.finish()?;
        if id != object::ROOT_TREE && id != object::CHUNK_TREE {
            self.roots.push((id, root));
        }
        Ok(root)
    }
}
