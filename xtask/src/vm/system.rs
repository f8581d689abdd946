//! The guest's programs: a read-only disk of the packages that this machine has installed, with everything they depend
//! on, file by file as dpkg lists them. No network, and the same libraries that the binaries under test were built on.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::Write;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};

use super::{image, whole};
use crate::setup;
use crate::shell::{describe, output};

/// What a running system needs beside the essential packages, and what the end-to-end tests and the scripts around them call.
const PACKAGES: &[&str] =
    &["ca-certificates", "e2fsprogs", "gawk", "iproute2", "kmod", "mawk", "mount", "passwd", "procps"];

/// Taken where they are installed: for looking into what happens.
const EXTRAS: &[&str] = &[
    "bash",
    "bpftrace",
    "erofs-utils",
    "gdb",
    "iputils-ping",
    "linux-perf",
    "lsof",
    "psmisc",
    "python3-minimal",
    "squashfs-tools",
    "strace",
    "time",
    "trace-cmd",
    "xfsprogs",
];

/// What no package lists: links and files that were made when packages were set up.
const UNLISTED: &[&str] = &[
    "/bin",
    "/sbin",
    "/lib",
    "/lib32",
    "/lib64",
    "/libx32",
    "/etc/alternatives",
    "/etc/group",
    "/etc/hosts",
    "/etc/ld.so.cache",
    "/etc/ld.so.conf",
    "/etc/ld.so.conf.d",
    "/etc/nginx",
    "/etc/nsswitch.conf",
    "/etc/passwd",
    "/etc/shadow",
    "/etc/ssl/certs",
];

/// Where links into /etc/alternatives may stand.
const LINKED: &[&str] = &["/usr/bin", "/usr/sbin"];

/// Left out: nobody reads a manual there.
const UNWANTED: &[&str] =
    &["/usr/share/doc", "/usr/share/man", "/usr/share/locale", "/usr/share/info", "/usr/share/i18n"];

const STATUS: &str = "/var/lib/dpkg/status";

/// The disk, made anew when a package has changed.
pub(super) fn disk(directory: &Path) -> Result<PathBuf> {
    let status = fs::read_to_string(STATUS).with_context(|| format!("{STATUS}: is this Debian?"))?;
    let installed = installed(&status);
    let mut roots: Vec<String> = PACKAGES.iter().map(ToString::to_string).collect();
    let essential =
        installed.iter().filter(|(_, fields)| fields.get("Essential").is_some_and(|value| value == "yes"));
    roots.extend(essential.map(|(name, _)| name.clone()));
    roots.extend(EXTRAS.iter().filter(|name| installed.contains_key(**name)).map(ToString::to_string));
    for (program, package) in setup::guest_packages() {
        roots.push(if installed.contains_key(package) { package.into() } else { owner(program)? });
    }
    let packages = closure(&installed, &roots);
    let mut hasher = DefaultHasher::new();
    // What is taken beside packages stands in this file.
    include_str!("system.rs").hash(&mut hasher);
    for name in &packages {
        (name, installed[name.as_str()].get("Version")).hash(&mut hasher);
    }
    let path = directory.join(format!("system-{:016x}.img", hasher.finish()));
    if !path.exists() {
        eprintln!("vm: making the system disk of {} packages", packages.len());
        for entry in fs::read_dir(directory)?.flatten() {
            if entry.file_name().to_string_lossy().starts_with("system-") {
                fs::remove_file(entry.path())?;
            }
        }
        whole(&path, |partial| make(&packages, &directory.join("system"), partial))?;
    }
    Ok(path)
}

fn make(packages: &BTreeSet<String>, tree: &Path, path: &Path) -> Result<()> {
    let files = files(packages)?;
    if tree.exists() {
        fs::remove_dir_all(tree)?;
    }
    for directory in ["proc", "sys", "dev", "tmp", "run", "root", "vm", "share", "scratch", "mnt", "var/tmp"]
    {
        fs::create_dir_all(tree.join(directory))?;
    }
    let mut pack = Command::new("tar");
    pack.args(["-c", "-C", "/", "--no-recursion", "--null", "--verbatim-files-from", "-T", "-"]);
    let mut pack = pack.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().context("cannot start tar")?;
    let mut unpack = Command::new("tar");
    unpack.args(["-x", "-p", "--numeric-owner", "-C"]).arg(tree);
    let packed = pack.stdout.take().context("tar's output is a pipe")?;
    let mut unpack = unpack.stdin(packed).spawn().context("cannot start tar")?;
    let mut list = pack.stdin.take().context("tar's input is a pipe")?;
    for file in &files {
        let relative = file.strip_prefix("/").unwrap_or(file);
        list.write_all(relative.as_os_str().as_bytes())?;
        list.write_all(b"\0")?;
    }
    drop(list);
    let (packed, unpacked) = (pack.wait()?, unpack.wait()?);
    ensure!(packed.success() && unpacked.success(), "copying this machine's programs failed");
    image(tree, path, 0)?;
    Ok(fs::remove_dir_all(tree)?)
}

/// The files of these packages as they lie on disk: a merged /usr makes dpkg's lists name some by a link.
fn files(packages: &BTreeSet<String>) -> Result<BTreeSet<PathBuf>> {
    let mut query = Command::new("dpkg-query");
    let listed = output(query.arg("-L").args(packages))?;
    let mut paths: Vec<PathBuf> =
        listed.lines().filter(|line| line.starts_with('/')).map(PathBuf::from).collect();
    for place in UNLISTED {
        paths.extend(tree(Path::new(place)));
    }
    for place in LINKED {
        for entry in fs::read_dir(place)?.flatten() {
            if fs::read_link(entry.path()).is_ok_and(|target| target.starts_with("/etc/alternatives")) {
                paths.push(entry.path());
            }
        }
    }
    let mut files = BTreeSet::new();
    for path in paths {
        if UNWANTED.iter().any(|unwanted| path.starts_with(unwanted)) {
            continue;
        }
        let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else { continue };
        let Ok(parent) = fs::canonicalize(parent) else { continue };
        let path = parent.join(name);
        if path.symlink_metadata().is_ok() {
            files.insert(path);
        }
    }
    Ok(files)
}

/// A path and all below it.
fn tree(path: &Path) -> Vec<PathBuf> {
    let mut found = vec![path.to_path_buf()];
    if path.symlink_metadata().is_ok_and(|metadata| metadata.is_dir()) {
        for entry in fs::read_dir(path).into_iter().flatten().flatten() {
            found.extend(tree(&entry.path()));
        }
    }
    found
}

/// The package that a program in PATH came with.
fn owner(program: &str) -> Result<String> {
    let places = ["/usr/sbin", "/usr/bin", "/sbin", "/bin"].map(|place| Path::new(place).join(program));
    let path = places.iter().find(|path| path.exists());
    let path = path.with_context(|| format!("{program} came with no package: the guest would lack it"))?;
    let path = fs::canonicalize(path)?;
    let line = output(Command::new("dpkg-query").arg("-S").arg(&path))?;
    let name = line.split(':').next().filter(|name| !name.is_empty());
    Ok(name.with_context(|| format!("{} belongs to no package", describe(&Command::new(&path))))?.to_string())
}

/// A paragraph of a control file: what stands behind each field's name, lines that go on joined.
type Paragraph = BTreeMap<String, String>;

/// The paragraphs of a text in deb822 form.
fn paragraphs(text: &str) -> impl Iterator<Item = Paragraph> {
    text.split("\n\n").map(|part| {
        let mut fields = Paragraph::new();
        let mut last = String::new();
        for line in part.lines().filter(|line| !line.starts_with('#')) {
            if line.starts_with([' ', '\t']) {
                if let Some(value) = fields.get_mut(&last) {
                    value.push('\n');
                    value.push_str(line.trim());
                }
            } else if let Some((name, value)) = line.split_once(':') {
                last = name.to_string();
                fields.insert(last.clone(), value.trim().to_string());
            }
        }
        fields
    })
}

/// The installed packages of dpkg's status by name.
fn installed(status: &str) -> HashMap<String, Paragraph> {
    let wanted =
        |fields: &Paragraph| fields.get("Status").is_some_and(|status| status.ends_with(" installed"));
    let named =
        paragraphs(status).filter(wanted).filter_map(|fields| Some((fields.get("Package")?.clone(), fields)));
    named.collect()
}

/// Names in a dependency field, alternatives among them: those that are installed are the ones that count.
fn names(field: &str) -> impl Iterator<Item = &str> {
    let words = field.split([',', '|']).filter_map(|part| part.split_whitespace().next());
    words.map(|word| word.split(':').next().unwrap_or(word))
}

/// The installed ones among `roots` and all that they depend on, by name or by what provides it.
fn closure(installed: &HashMap<String, Paragraph>, roots: &[String]) -> BTreeSet<String> {
    let mut provided: HashMap<&str, Vec<&str>> = HashMap::new();
    for (name, fields) in installed {
        for virtual_name in fields.get("Provides").into_iter().flat_map(|field| names(field)) {
            provided.entry(virtual_name).or_default().push(name);
        }
    }
    let mut found = BTreeSet::new();
    let mut open: Vec<&str> = roots.iter().map(String::as_str).collect();
    while let Some(name) = open.pop() {
        let Some(fields) = installed.get(name) else {
            let providers = provided.get(name).into_iter().flatten();
            open.extend(providers.filter(|provider| !found.contains(**provider)));
            continue;
        };
        if found.insert(name.to_string()) {
            for field in ["Depends", "Pre-Depends"] {
                open.extend(fields.get(field).into_iter().flat_map(|field| names(field)));
            }
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::{closure, installed, names, paragraphs};

    const STATUS: &str = "\
Package: nginx-light
Status: install ok installed
Version: 1.22.1-9
Depends: nginx (>= 1.22), libc6:any (>= 2.28) | libc6.1,
 httpd-cgi
Description: small
 Depends: not-a-field

Package: libc6
Status: install ok installed
Version: 2.36

Package: fcgiwrap
Status: install ok installed
Provides: httpd-cgi (= 1), other

Package: nginx
Status: install ok installed
Pre-Depends: libc6

Package: gone
Status: deinstall ok config-files
";

    #[test]
    fn fields_go_on_over_lines() {
        let first = paragraphs(STATUS).next().unwrap();
        assert_eq!(first["Version"], "1.22.1-9");
        let depends: Vec<&str> = names(&first["Depends"]).collect();
        assert_eq!(depends, ["nginx", "libc6", "libc6.1", "httpd-cgi"]);
        assert_eq!(first["Description"], "small\nDepends: not-a-field");
    }

    #[test]
    fn dependencies_are_followed_through_what_provides_them() {
        let installed = installed(STATUS);
        assert_eq!(installed.len(), 4);
        let found = closure(&installed, &["nginx-light".into(), "gone".into()]);
        assert_eq!(
            found.iter().map(String::as_str).collect::<Vec<_>>(),
            ["fcgiwrap", "libc6", "nginx", "nginx-light"]
        );
    }
}
