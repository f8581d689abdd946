//! `quota`: simple quotas of any btrfs, a pool's or not.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use loam_pool::quota::{
    self, ExplainOptions, Explanation, Group, GroupId, LimitKind, LimitOutcome, Mode, Report, Shown, Source,
    Target,
};
use serde::Serialize;

use super::Context;
use crate::arguments::quota::{GroupName, Quota, QuotaGroup, QuotaLimit, QuotaMembers, QuotaVerify};
use crate::output::{self, size};

/// Files of one extent that are named.
const FILES_SHOWN: usize = 4;

pub(crate) fn run(context: &Context, command: Quota) -> anyhow::Result<ExitCode> {
    match command {
        Quota::Enable { path, full } => enable(context, &path, full),
        Quota::Disable { path } => disable(context, &path),
        Quota::Limit(options) => limit(context, &options),
        Quota::Group { command } => group(context, command),
        Quota::Show { path, no_sync } => show(context, &path, !no_sync),
        Quota::Verify(options) => return verify(context, &options),
    }
    .map(|()| ExitCode::SUCCESS)
}

/// Errors of quotas with their hints.
trait Hinted<T> {
    fn hinted(self) -> loam_pool::Result<T>;
}

impl<T> Hinted<T> for quota::Result<T> {
    fn hinted(self) -> loam_pool::Result<T> {
        self.map_err(Into::into)
    }
}

fn enable(context: &Context, path: &Path, full: bool) -> anyhow::Result<()> {
    let enabled = quota::enable(path, if full { Mode::Full } else { Mode::Simple }).hinted()?;
    output::print(context.json, &enabled, |enabled| {
        let already = if enabled.changed { "" } else { " already" };
        let since = match enabled.enable_generation {
            Some(generation) => format!(", counting from transaction {generation} on"),
            None => String::new(),
        };
        format!("{}: {} are on{already}{since}", path.display(), enabled.mode)
    })
}

/// What `quota disable` did.
#[derive(Serialize)]
struct Disabled {
    changed: bool,
}

fn disable(context: &Context, path: &Path) -> anyhow::Result<()> {
    let changed = quota::disable(path).hinted()?;
    output::print(context.json, &Disabled { changed }, |_| {
        let state = if changed { "off; groups and limits are forgotten" } else { "off already" };
        format!("{}: quotas are {state}", path.display())
    })
}

fn limit(context: &Context, options: &QuotaLimit) -> anyhow::Result<()> {
    let path = &options.path;
    let kind = if options.exclusive { LimitKind::Exclusive } else { LimitKind::Referenced };
    let outcome = match options.group {
        Some(group) => quota::limit(path, &Target::Group(group), options.limit, kind),
        None if options.nested => quota::contain(path, options.limit),
        // Where a group is around the subvolume it is that whose limit counts.
        None => quota::group_at(path)
            .and_then(|group| quota::limit(path, &Target::Group(group), options.limit, kind)),
    };
    print_limit(context, &outcome.hinted()?)
}

fn print_limit(context: &Context, outcome: &LimitOutcome) -> anyhow::Result<()> {
    if let Some(limit) = outcome.limit_bytes.filter(|_| outcome.over_limit) {
        let (used, limit) = (size(outcome.used_bytes), size(limit));
        eprintln!(
            "loam: group {}: {used} are used already, more than {limit}: writes fail until enough is deleted",
            outcome.group
        );
    }
    output::print(context.json, outcome, |outcome| {
        let limit = outcome.limit_bytes.map_or_else(|| "no limit".to_owned(), size);
        format!("{}: {limit}, {} used", outcome.group, size(outcome.used_bytes))
    })
}

/// What a change of groups came to.
#[derive(Serialize)]
struct Changed {
    group: GroupId,
    members: Vec<GroupId>,
}

fn group(context: &Context, command: QuotaGroup) -> anyhow::Result<()> {
    match command {
        QuotaGroup::Create { path, group, limit } => {
            quota::create_group(&path, group).hinted()?;
            match limit {
                Some(limit) => {
                    let set = quota::limit(&path, &Target::Group(group), limit, LimitKind::Referenced);
                    if set.is_err() {
                        // Why it failed is what must be told.
                        let _ = quota::remove_group(&path, group);
                    }
                    print_limit(context, &set.hinted()?)
                }
                None => print_change(context, Changed { group, members: Vec::new() }, "made"),
            }
        }
        QuotaGroup::Rm { path, group } => {
            quota::remove_group(&path, group).hinted()?;
            print_change(context, Changed { group, members: Vec::new() }, "removed")
        }
        QuotaGroup::Add(options) => members(context, options, quota::assign, "with"),
        QuotaGroup::Remove(options) => members(context, options, quota::unassign, "without"),
    }
}

fn members(
    context: &Context,
    options: QuotaMembers,
    change: fn(&Path, GroupId, GroupId) -> quota::Result<()>,
    word: &str,
) -> anyhow::Result<()> {
    let QuotaMembers { path, group, members } = options;
    let members = members.into_iter().map(|member| member_of(member, group));
    let members = members.collect::<quota::Result<Vec<GroupId>>>().hinted()?;
    for &member in &members {
        change(&path, member, group).hinted()?;
    }
    print_change(context, Changed { group, members }, word)
}

/// The group that stands for a subvolume as a member: the one around it, where there is one and the levels allow it.
fn member_of(name: GroupName, group: GroupId) -> quota::Result<GroupId> {
    Ok(match name {
        GroupName::Group(member) => member,
        GroupName::Subvolume(path) => {
            let around = quota::group_at(&path)?;
            if around.level() < group.level() { around } else { GroupId::from_raw(around.number()) }
        }
    })
}

fn print_change(context: &Context, changed: Changed, word: &str) -> anyhow::Result<()> {
    output::print(context.json, &changed, |changed| {
        let members: Vec<String> = changed.members.iter().map(GroupId::to_string).collect();
        format!("{}: {word} {}", changed.group, members.join(", ")).trim_end().to_owned()
    })
}

fn show(context: &Context, path: &Path, sync: bool) -> anyhow::Result<()> {
    let shown = quota::show(path, sync).hinted()?;
    output::print(context.json, &shown, describe)
}

fn describe(shown: &Shown) -> String {
    let mut text = format!("{}: {}", shown.path.display(), shown.mode);
    if let Some(generation) = shown.enable_generation {
        let _ = write!(text, ", counting from transaction {generation} on");
    }
    if shown.rescanning || shown.inconsistent {
        text.push_str("; the numbers are wrong until a rescan has ended");
    }
    text.push('\n');
    let full = shown.mode == Mode::Full;
    let mut header = vec!["GROUP", "USED", "LIMIT", "FREE", "PATH"];
    if full {
        header.insert(2, "EXCLUSIVE");
    }
    let row = |row: quota::Row<'_>| {
        let Group { group, .. } = row.group;
        let mut cells = vec![
            format!("{}{group}", "  ".repeat(row.depth)),
            size(row.group.referenced_bytes),
            limits(row.group),
            free(row.group),
            name(row.group),
        ];
        if full {
            cells.insert(2, size(row.group.exclusive_bytes));
        }
        cells
    };
    let rows: Vec<_> = shown.rows().into_iter().map(row).collect();
    text.push_str(&output::table(&header, &rows));
    text
}

fn limits(group: &Group) -> String {
    let exclusive = group.limit_exclusive_bytes.map(|bytes| format!("{} exclusive", size(bytes)));
    let limits: Vec<String> = group.limit_referenced_bytes.map(size).into_iter().chain(exclusive).collect();
    if limits.is_empty() { "-".to_owned() } else { limits.join(", ") }
}

fn free(group: &Group) -> String {
    match (group.free_bytes, group.limited_by) {
        (Some(free), Some(by)) if by != group.group => format!("{} ({by})", size(free)),
        (Some(free), _) => size(free),
        (None, _) => "-".to_owned(),
    }
}

fn name(group: &Group) -> String {
    match &group.path {
        Some(path) if group.level == 0 => Path::new("/").join(path).display().to_string(),
        Some(path) => format!("around {}", Path::new("/").join(path).display()),
        None if group.deleted => "(deleted: not cleaned up yet, or others have what it wrote)".to_owned(),
        None => String::new(),
    }
}

fn verify(context: &Context, options: &QuotaVerify) -> anyhow::Result<ExitCode> {
    let source = Source::open(&options.paths).hinted()?;
    if let Some(name) = &options.explain {
        let group = match name {
            GroupName::Group(group) => *group,
            GroupName::Subvolume(path) => quota::group_at(path).hinted()?,
        };
        let explanation = quota::explain(&source, Some(group), &ExplainOptions::default()).hinted()?;
        output::print(context.json, &explanation, explain)?;
        return Ok(ExitCode::SUCCESS);
    }
    let report = quota::verify(&source).hinted()?;
    if !report.verified && report.is_clean() {
        return Err(not_verified(&options.paths, &report));
    }
    for note in &report.notes {
        eprintln!("loam: note: {note}");
    }
    output::print(context.json, &report, findings)?;
    Ok(if report.is_clean() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn not_verified(paths: &[PathBuf], report: &Report) -> anyhow::Error {
    let (why, hint) = match report.mode {
        quota::TreeMode::Full => {
            ("full qgroups are on: only simple quotas are verified here", "btrfs check --qgroup-report DEV")
        }
        _ => ("quotas are not enabled on this filesystem", "loam quota enable PATH"),
    };
    let path = paths.first().map(|path| path.display().to_string()).unwrap_or_default();
    loam_pool::Error::step(path, why).with_hint(hint).into()
}

fn findings(report: &Report) -> String {
    let mut text = String::new();
    for finding in &report.findings {
        let _ = writeln!(text, "{finding}");
    }
    if report.findings_left_out > 0 {
        let _ = writeln!(text, "and {} more", report.findings_left_out);
    }
    text
}

fn explain(explanation: &Explanation) -> String {
    let mut text = String::new();
    let subvolumes = explanation.subvolumes.iter().map(|(id, path)| match path {
        Some(path) => format!("{id} /{path}"),
        None => format!("{id} (deleted)"),
    });
    let _ = writeln!(text, "group {} of {}", explanation.group, subvolumes.collect::<Vec<_>>().join(", "));
    let _ = writeln!(
        text,
        "charged {}: {} data, {} metadata; kept by others alone: {} data, {} metadata",
        size(explanation.charged_bytes),
        size(explanation.data_bytes),
        size(explanation.metadata_bytes),
        size(explanation.kept_by_others_bytes),
        size(explanation.metadata_kept_by_others_bytes)
    );
    let rows: Vec<_> = explanation.extents.iter().map(extent_row).collect();
    if !rows.is_empty() {
        text.push_str(&output::table(&["EXTENT", "IN USE", "WHO HAS IT", "FILES"], &rows));
    }
    for line in explanation.advice.iter().chain(&explanation.notes) {
        let _ = writeln!(text, "{line}");
    }
    text
}

fn extent_row(extent: &quota::LargeExtent) -> Vec<String> {
    let standing = match extent.standing {
        quota::Standing::Own => "itself",
        quota::Standing::Shared => "itself and others",
        quota::Standing::KeptByOthers => "others alone",
        quota::Standing::KeptAfterDeletion => "others alone; it is deleted",
        quota::Standing::Unreferenced => "nobody",
    };
    let file = |reference: &quota::Reference| {
        let subvolume = match &reference.subvolume_path {
            Some(path) => Path::new("/").join(path),
            None => PathBuf::from(format!("(subvolume {})", reference.subvolume)),
        };
        match &reference.path {
            Some(path) => subvolume.join(path).display().to_string(),
            None => format!("{} inode {}", subvolume.display(), reference.inode),
        }
    };
    let mut files: Vec<String> = extent.references.iter().take(FILES_SHOWN).map(file).collect();
    let more = extent.files.saturating_sub(files.len() as u64);
    if more > 0 {
        files.push(format!("and {more} more"));
    }
    vec![
        size(extent.bytes),
        extent.used_bytes.map_or_else(|| "-".to_owned(), size),
        standing.to_owned(),
        files.join(", "),
    ]
}
