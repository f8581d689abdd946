//! Which targets are read by which workloads: the presets, and the full product of what the command line lists.

use loam_attach::ublk::DataPath;
use loam_block::size::ByteSize;

use super::target::{Layout, LoamTarget, Queues, Reference, Source, Target};
use super::workload::Workload;
use crate::serve::Transport;

/// Sizes of the virtual region: the seed study's, which every layout takes, and a pool's.
const SMALL_REGION: ByteSize = ByteSize(275 << 30);
const LARGE_REGION: ByteSize = ByteSize(4 << 60);
/// A clone that no memory holds: only computed content has it.
const LARGE_CLONE: ByteSize = ByteSize(64 << 30);

/// Block devices.
const RAW: &[&str] = &["psync:1", "psync:2", "io_uring:1x64", "io_uring:2x64"];
/// Files.
const FILE: &[&str] = &["psync:1", "psync:2", "psync:6", "io_uring:1x64", "io_uring:2x64", "io_uring:4x64"];
/// One of each kind: to compare what should make no difference.
const SHORT: &[&str] = &["psync:1", "io_uring:1x64"];
/// Through the page cache.
const CACHED: &[&str] = &["psync:1:buffered", "mmap:1"];
const ALL: &[&str] = &[
    "psync:1",
    "psync:2",
    "psync:6",
    "psync:12",
    "io_uring:1x8",
    "io_uring:1x64",
    "io_uring:2x64",
    "io_uring:4x64",
    "psync:1:buffered",
    "psync:6:buffered",
    "mmap:1",
    "mmap:4",
];

/// A set of comparisons.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Preset {
    /// What the published tables show: about a hundred and thirty cells.
    Standard,
    /// Every option against every other where that says anything: hours.
    Full,
}

/// Lists of options; their product is measured.
#[derive(Debug, Clone, Default, clap::Args)]
pub(crate) struct Lists {
    /// Transports [default: ublk].
    #[arg(long, value_enum, value_delimiter = ',')]
    pub(crate) transport: Vec<Transport>,
    /// Layouts [default: pair].
    #[arg(long, value_enum, value_delimiter = ',')]
    pub(crate) layout: Vec<Layout>,
    /// Where the bytes come from [default: memory].
    #[arg(long, value_enum, value_delimiter = ',')]
    pub(crate) content: Vec<Source>,
    /// Bytes of the virtual region [default: 4EiB].
    #[arg(long, value_name = "SIZE", value_delimiter = ',')]
    pub(crate) virtual_size: Vec<ByteSize>,
    /// Bytes of the file that is read [default: --size].
    #[arg(long, value_name = "SIZE", value_delimiter = ',')]
    pub(crate) clone_size: Vec<ByteSize>,
    /// Queues, or threads of the FUSE server: numbers or auto [default: auto].
    #[arg(long, value_name = "N", value_delimiter = ',')]
    pub(crate) queues: Vec<Queues>,
    /// Data paths of ublk [default: auto].
    #[arg(long, value_delimiter = ',')]
    pub(crate) data_path: Vec<DataPath>,
    /// What to compare with.
    #[arg(long, value_enum, value_delimiter = ',')]
    pub(crate) reference: Vec<Reference>,
}

/// Targets with their workloads, each target once.
#[derive(Debug, Default)]
pub(crate) struct Plan(pub(crate) Vec<(Target, Vec<Workload>)>);

impl Plan {
    fn add(&mut self, target: Target, workloads: &[Workload]) {
        let position = self.0.iter().position(|(known, _)| *known == target).unwrap_or_else(|| {
            self.0.push((target, Vec::new()));
            self.0.len() - 1
        });
        let known = &mut self.0[position].1;
        for workload in workloads {
            if !known.contains(workload) {
                known.push(*workload);
            }
        }
    }

    /// Runs of one round.
    pub(crate) fn cells(&self) -> usize {
        self.0.iter().map(|(_, workloads)| workloads.len()).sum()
    }
}

impl Lists {
    /// Whether the command line names targets.
    fn is_empty(&self) -> bool {
        self.loam_is_empty() && self.reference.is_empty()
    }

    fn loam_is_empty(&self) -> bool {
        self.transport.is_empty()
            && self.layout.is_empty()
            && self.content.is_empty()
            && self.virtual_size.is_empty()
            && self.clone_size.is_empty()
            && self.queues.is_empty()
            && self.data_path.is_empty()
    }

    /// Every combination; a list that is empty is its default.
    fn product(&self, size: ByteSize) -> Vec<LoamTarget> {
        fn or<T: Copy>(list: &[T], default: T) -> Vec<T> {
            if list.is_empty() { vec![default] } else { list.to_vec() }
        }
        let mut targets = Vec::new();
        for transport in or(&self.transport, Transport::Ublk) {
            for layout in or(&self.layout, Layout::Pair) {
                for source in or(&self.content, Source::Memory) {
                    for virtual_size in or(&self.virtual_size, LARGE_REGION) {
                        for clone_size in or(&self.clone_size, size) {
                            for Queues(queues) in or(&self.queues, Queues(None)) {
                                for data_path in or(&self.data_path, DataPath::Auto) {
                                    let virtual_size =
                                        if layout == Layout::Raw { ByteSize(0) } else { virtual_size };
                                    targets.push(LoamTarget {
                                        transport,
                                        layout,
                                        source,
                                        virtual_size,
                                        clone_size,
                                        queues,
                                        data_path,
                                    });
                                }
                            }
                        }
                    }
                }
            }
        }
        targets
    }
}

fn parsed(workloads: &[&str]) -> Vec<Workload> {
    workloads.iter().filter_map(|text| text.parse().ok()).collect()
}

/// What is to be measured. `size`: bytes of all that lies in memory.
pub(crate) fn plan(
    preset: Preset,
    quick: bool,
    lists: &Lists,
    workloads: &[Workload],
    size: ByteSize,
) -> Plan {
    let mut plan = Plan::default();
    if !lists.is_empty() {
        let workloads = if workloads.is_empty() { parsed(FILE) } else { workloads.to_vec() };
        if !lists.loam_is_empty() {
            lists.product(size).into_iter().for_each(|target| plan.add(Target::Loam(target), &workloads));
        }
        lists.reference.iter().for_each(|kind| plan.add(Target::Reference { kind: *kind, size }, &workloads));
        return plan;
    }
    let chosen = |default: &[&str]| if workloads.is_empty() { parsed(default) } else { workloads.to_vec() };
    let mut add = |lists: Lists, workloads: &[&str]| {
        let workloads = chosen(workloads);
        if !lists.loam_is_empty() {
            lists.product(size).into_iter().for_each(|target| plan.add(Target::Loam(target), &workloads));
        }
        lists.reference.iter().for_each(|kind| plan.add(Target::Reference { kind: *kind, size }, &workloads));
    };
    match (quick, preset) {
        (true, _) => quick_plan(&mut add),
        (false, Preset::Standard) => standard(&mut add),
        (false, Preset::Full) => full(&mut add),
    }
    plan
}

fn quick_plan(add: &mut impl FnMut(Lists, &[&str])) {
    let transport = vec![Transport::Ublk, Transport::Loop];
    let raw = Lists { transport: transport.clone(), layout: vec![Layout::Raw], ..Lists::default() };
    add(Lists { content: vec![Source::Pattern], ..raw }, SHORT);
    let layout = vec![Layout::Pair, Layout::Single];
    add(Lists { transport, layout, virtual_size: vec![SMALL_REGION], ..Lists::default() }, SHORT);
    let reference = vec![
        Reference::RublkNull,
        Reference::BtrfsRublkLoop,
        Reference::BtrfsBrd,
        Reference::Tmpfs,
        Reference::Fuse,
        Reference::FuseLoop,
        Reference::BtrfsLoopTmpfs,
    ];
    add(Lists { reference, ..Lists::default() }, SHORT);
}

fn standard(add: &mut impl FnMut(Lists, &[&str])) {
    use Reference::*;
    let ublk = || Lists { transport: vec![Transport::Ublk], ..Lists::default() };
    let raw = || Lists { layout: vec![Layout::Raw], ..ublk() };
    add(Lists { content: vec![Source::Memory, Source::Pattern], ..raw() }, RAW);
    add(Lists { data_path: vec![DataPath::ZeroCopy], ..raw() }, RAW);
    let by_loop = || Lists { transport: vec![Transport::Loop], ..Lists::default() };
    add(Lists { layout: vec![Layout::Raw], ..by_loop() }, RAW);
    let content = vec![Source::Memory, Source::Cache, Source::Pattern, Source::Disk];
    add(Lists { content, ..ublk() }, FILE);
    add(by_loop(), FILE);
    let layout = vec![Layout::Pair, Layout::Single, Layout::MegaExtent, Layout::SmallExtents];
    add(Lists { layout, virtual_size: vec![SMALL_REGION], ..ublk() }, SHORT);
    let reference = vec![RublkNull, RublkNullZeroCopy, RublkLoop, Brd, LoopTmpfs, FuseLoop, DevZero];
    add(Lists { reference, ..Lists::default() }, RAW);
    let reference = vec![BtrfsRublkLoop, BtrfsBrd, BtrfsLoopTmpfs, Ext4Brd, Tmpfs, Fuse];
    add(Lists { reference, ..Lists::default() }, FILE);
    add(ublk(), CACHED);
    add(Lists { reference: vec![BtrfsRublkLoop, BtrfsBrd, Ext4Brd, Tmpfs], ..Lists::default() }, CACHED);
}

fn full(add: &mut impl FnMut(Lists, &[&str])) {
    standard(add);
    let transport = vec![Transport::Ublk, Transport::Loop];
    let content = vec![Source::Pattern, Source::Memory, Source::Cache, Source::Disk];
    let virtual_size = vec![SMALL_REGION, LARGE_REGION];
    let layout = vec![Layout::Raw, Layout::Pair, Layout::Single, Layout::MegaExtent];
    let lists = Lists { transport: transport.clone(), layout, content, ..Lists::default() };
    add(Lists { virtual_size: virtual_size.clone(), ..lists }, ALL);
    let small = Lists { transport, layout: vec![Layout::SmallExtents], ..Lists::default() };
    add(Lists { virtual_size: virtual_size.clone(), ..small }, ALL);
    let large = Lists { content: vec![Source::Pattern], clone_size: vec![LARGE_CLONE], ..Lists::default() };
    add(Lists { virtual_size, layout: vec![Layout::Pair, Layout::Single], ..large }, ALL);
    let queues = [None, Some(1), Some(2), Some(4)].map(Queues).to_vec();
    let data_path = vec![DataPath::Auto, DataPath::Copy, DataPath::UserCopy, DataPath::ZeroCopy];
    let content = vec![Source::Memory, Source::Cache];
    let layout = vec![Layout::Raw, Layout::Pair];
    add(Lists { layout, content, queues, data_path, ..Lists::default() }, ALL);
    let reference = <Reference as clap::ValueEnum>::value_variants();
    let reference = reference.iter().copied().filter(|kind| *kind != Reference::DevZero).collect();
    add(Lists { reference, ..Lists::default() }, ALL);
}

/// The targets of the standard preset, for tests of what is said about them.
#[cfg(test)]
pub(super) fn standard_targets(size: ByteSize) -> Vec<Target> {
    let plan = plan(Preset::Standard, false, &Lists::default(), &[], size);
    plan.0.into_iter().map(|(target, _)| target).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZE: ByteSize = ByteSize(256 << 20);

    #[test]
    fn presets_name_every_workload_rightly() {
        for list in [RAW, FILE, SHORT, CACHED, ALL] {
            assert_eq!(parsed(list).len(), list.len());
        }
        let count = |preset, quick| plan(preset, quick, &Lists::default(), &[], SIZE).cells();
        let (quick, standard) = (count(Preset::Standard, true), count(Preset::Standard, false));
        assert!(quick < 40 && (100..160).contains(&standard), "{quick} and {standard} cells");
        assert!(count(Preset::Full, false) > 5 * standard);
    }

    #[test]
    fn lists_replace_the_preset_and_raw_devices_have_no_region() {
        let lists = Lists {
            layout: vec![Layout::Raw, Layout::Pair],
            virtual_size: vec![SMALL_REGION, LARGE_REGION],
            reference: vec![Reference::Tmpfs],
            ..Lists::default()
        };
        let workload = "psync:1".parse().unwrap();
        let plan = plan(Preset::Standard, false, &lists, &[workload], SIZE);
        let names: Vec<String> = plan.0.iter().map(|(target, _)| target.to_string()).collect();
        let expected =
            ["loam ublk raw memory", "loam ublk pair memory 275GiB", "loam ublk pair memory 4EiB", "tmpfs"];
        assert_eq!(names, expected);
        assert_eq!(plan.cells(), 4);
    }
}
