//! Selects the tests that a change could make fail.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::process::Command;

use anyhow::Result;

use crate::packages::output;
use crate::paths;
use crate::product;

/// A package of the workspace.
pub struct Package {
    /// Name of the package.
    pub name: String,
    /// Its directory below the workspace, with a slash at the end; empty for the top one.
    pub dir: String,
    /// Packages of the workspace that it or its tests depend on.
    pub needs: Vec<String>,
}

/// Selected tests.
#[derive(Default, Debug, PartialEq)]
pub struct Selection {
    /// Lints, of both architectures: Rust code has changed.
    pub lints: bool,
    /// Packages whose unit tests are run.
    pub units: BTreeSet<String>,
    /// The models of interleavings in `iommu`.
    pub loom: bool,
    /// Clients of the API.
    pub clients: bool,
    /// Fuzz targets on their seeds.
    pub fuzz: bool,
    /// Boot test programs.
    pub programs: BTreeSet<String>,
    /// Each changed path with the tests that it selects.
    pub reasons: Vec<String>,
}

/// Files that select all tests.
const EVERYTHING: [&str; 5] = [
    "Cargo.toml",
    "Cargo.lock",
    "clippy.toml",
    ".cargo/",
    "rust-toolchain",
];

/// Boot test programs by the prefix of a path, `*` for all; the longest prefix counts. `unit-…` are
/// unit tests that run where boot tests do.
const PROGRAMS: [(&str, &[&str]); 18] = [
    ("iommu/src/", &["viommu", "vhost"]),
    ("devices/src/", &["devices", "viommu", "vhost"]),
    ("devices/src/legacy/", &["boot", "console"]),
    ("arch/src/", &["boot", "refused", "unit-arch"]),
    ("vmm/src/", &["*"]),
    ("vmm/src/config/", &["devices", "refused", "unit-vmm"]),
    ("vmm/src/console/", &["console", "unit-vmm"]),
    ("src/", &["console", "refused"]),
    ("tests/support/", &["*"]),
    ("tests/support/iommu", &["viommu"]),
    ("tests/support/pty", &["console"]),
    ("tests/guest-driver/", &["viommu"]),
    ("xtask/guest/", &["boot"]),
    ("xtask/lab/", &["boot"]),
    ("xtask/src/lab/", &["boot"]),
    ("xtask/src/debian", &["debian"]),
    ("xtask/src/guest", &["boot"]),
    ("xtask/src/kernel", &["boot"]),
];

/// Selects the tests for changes of these paths, which are relative to the workspace.
pub fn choose(changed: &[String], packages: &[Package], programs: &[String]) -> Selection {
    let mut all = Selection::default();
    for path in changed {
        let one = concerned(path, packages, programs);
        all.reasons.push(format!("{path}: {}", one.describe()));
        all.lints |= one.lints;
        all.units.extend(one.units);
        all.loom |= one.loom;
        all.clients |= one.clients;
        all.fuzz |= one.fuzz;
        all.programs.extend(one.programs);
    }
    all
}

/// The tests that a change of one path selects.
fn concerned(path: &str, packages: &[Package], programs: &[String]) -> Selection {
    if EVERYTHING.iter().any(|prefix| path.starts_with(prefix)) {
        return everything(packages, programs);
    }
    let mut one = Selection {
        lints: path.ends_with(".rs") || path.ends_with("Cargo.toml"),
        loom: path.starts_with("iommu/"),
        clients: path.starts_with("api/") || path.starts_with("resources/"),
        fuzz: path.starts_with("fuzz/"),
        ..Selection::default()
    };
    if let Some(program) = programs.iter().find(|name| is_source_of(path, name)) {
        one.programs.insert(program.clone());
    } else {
        let longest = PROGRAMS
            .iter()
            .filter(|(prefix, _)| path.starts_with(prefix))
            .max_by_key(|(prefix, _)| prefix.len());
        let chosen = longest.map_or(&[][..], |(_, chosen)| *chosen);
        let is_chosen = |name: &&String| chosen == ["*"] || chosen.contains(&name.as_str());
        one.programs
            .extend(programs.iter().filter(is_chosen).cloned());
    }
    let is_document = path.ends_with(".md") || path.starts_with("LICENSE");
    if !is_document && !one.fuzz {
        let owner = packages
            .iter()
            .filter(|package| path.starts_with(&package.dir))
            .max_by_key(|package| package.dir.len());
        one.units = owner.map_or_else(BTreeSet::new, |owner| dependents(&owner.name, packages));
    }
    if path.starts_with("resources/") || path == "docs/api.md" {
        // Tests of the command line and of the API read these files.
        one.units.extend(["portcullis", "api"].map(str::to_owned));
    }
    one
}

/// All tests.
fn everything(packages: &[Package], programs: &[String]) -> Selection {
    Selection {
        lints: true,
        units: packages
            .iter()
            .map(|package| package.name.clone())
            .collect(),
        loom: true,
        clients: true,
        fuzz: true,
        programs: programs.iter().cloned().collect(),
        reasons: Vec::new(),
    }
}

/// Whether `path` is the source of the test program `name`.
fn is_source_of(path: &str, name: &str) -> bool {
    let file = path.rsplit_once("tests/").map(|(_, file)| file);
    file.and_then(|file| file.strip_suffix(".rs")) == Some(name)
}

/// A package and all packages that depend on it, directly or not.
fn dependents(name: &str, packages: &[Package]) -> BTreeSet<String> {
    let mut users: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for package in packages {
        for need in &package.needs {
            users.entry(need).or_default().push(&package.name);
        }
    }
    let mut found = BTreeSet::new();
    let mut waiting = vec![name];
    while let Some(name) = waiting.pop() {
        if found.insert(name.to_owned()) {
            waiting.extend(users.get(name).into_iter().flatten());
        }
    }
    found
}

impl Selection {
    /// Describes the selection for the report.
    pub fn describe(&self) -> String {
        let mut parts = vec!["formatting and documents".to_owned()];
        if self.lints {
            parts.push("lints".to_owned());
        }
        if !self.units.is_empty() {
            parts.push(format!("unit tests of {}", joined(&self.units)));
        }
        for (chosen, what) in [
            (self.loom, "loom"),
            (self.clients, "API clients"),
            (self.fuzz, "fuzz targets"),
        ] {
            if chosen {
                parts.push(what.to_owned());
            }
        }
        if !self.programs.is_empty() {
            parts.push(format!("boot tests {}", joined(&self.programs)));
        }
        parts.join("; ")
    }
}

fn joined(names: &BTreeSet<String>) -> String {
    let names: Vec<_> = names.iter().map(String::as_str).collect();
    names.join(", ")
}

/// The packages of the workspace.
pub fn packages() -> Result<Vec<Package>> {
    let mut found = Vec::new();
    for package in product::metadata()? {
        let manifest = Path::new(package["manifest_path"].as_str().unwrap_or_default());
        let dir = manifest.parent().unwrap_or(manifest);
        let dir = dir.strip_prefix(paths::workspace())?.display().to_string();
        let needs = package["dependencies"].as_array().into_iter().flatten();
        found.push(Package {
            name: package["name"].as_str().unwrap_or_default().to_owned(),
            dir: if dir.is_empty() { dir } else { dir + "/" },
            // Only packages of the workspace have a path.
            needs: needs
                .filter(|need| need["path"].is_string())
                .filter_map(|need| need["name"].as_str().map(str::to_owned))
                .collect(),
        });
    }
    Ok(found)
}

/// Paths that differ from the branch point of `main`: in commits, in the working tree, and
/// untracked files.
pub fn paths() -> Result<Vec<String>> {
    let git = |arguments: &[&str]| {
        let mut git = Command::new("git");
        output(git.current_dir(paths::workspace()).args(arguments))
    };
    let base = ["main", "origin/main"]
        .iter()
        .find_map(|branch| git(&["merge-base", "HEAD", branch]).ok())
        .unwrap_or_else(|| "HEAD".to_owned());
    let mut text = git(&["diff", "--name-only", base.trim()])?;
    text += &git(&["ls-files", "--others", "--exclude-standard"])?;
    Ok(text.lines().map(str::to_owned).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn packages() -> Vec<Package> {
        [
            ("portcullis", "", vec!["vmm", "api"]),
            ("iommu", "iommu/", vec![]),
            ("devices", "devices/", vec!["iommu"]),
            ("arch", "arch/", vec![]),
            ("vmm", "vmm/", vec!["devices", "arch", "iommu"]),
            ("api", "api/", vec!["vmm"]),
            ("xtask", "xtask/", vec![]),
            ("guest-driver", "tests/guest-driver/", vec![]),
        ]
        .map(|(name, dir, needs)| Package {
            name: name.to_owned(),
            dir: dir.to_owned(),
            needs: needs.into_iter().map(str::to_owned).collect(),
        })
        .into()
    }

    fn programs() -> Vec<String> {
        [
            "boot", "console", "devices", "refused", "vhost", "viommu", "unit-vmm",
        ]
        .map(str::to_owned)
        .into()
    }

    fn chosen(path: &str) -> Selection {
        concerned(path, &packages(), &programs())
    }

    fn names(set: &BTreeSet<String>) -> Vec<&str> {
        set.iter().map(String::as_str).collect()
    }

    #[test]
    fn a_change_concerns_its_package_and_those_that_use_it() {
        let iommu = chosen("iommu/src/gate.rs");
        let users = ["api", "devices", "iommu", "portcullis", "vmm"];
        assert_eq!(names(&iommu.units), users);
        assert_eq!(names(&iommu.programs), ["vhost", "viommu"]);
        assert!(iommu.lints && iommu.loom && !iommu.clients && !iommu.fuzz);

        let api = chosen("api/src/server.rs");
        assert_eq!(names(&api.units), ["api", "portcullis"]);
        assert!(api.programs.is_empty() && api.clients && !api.loom);

        let xtask = chosen("xtask/src/packages.rs");
        assert_eq!(names(&xtask.units), ["xtask"]);
        assert!(xtask.programs.is_empty());
    }

    #[test]
    fn the_longest_beginning_of_a_path_chooses_the_boot_tests() {
        let console = chosen("vmm/src/console/input.rs");
        assert_eq!(names(&console.programs), ["console", "unit-vmm"]);
        let serial = chosen("devices/src/legacy/serial.rs");
        assert_eq!(names(&serial.programs), ["boot", "console"]);
    }

    #[test]
    fn a_boot_test_concerns_itself() {
        let own = chosen("tests/devices.rs");
        assert_eq!(names(&own.programs), ["devices"]);
        let own = chosen("devices/tests/vhost.rs");
        assert_eq!(names(&own.programs), ["vhost"]);
        let support = chosen("tests/support/mod.rs");
        assert_eq!(support.programs.len(), programs().len());
        let no_boot = chosen("tests/bench_parse.rs");
        assert!(no_boot.programs.is_empty());
        assert_eq!(names(&no_boot.units), ["portcullis"]);
    }

    #[test]
    fn documents_concern_the_checks_of_documents() {
        let tour = choose(&["CONTRIBUTING.md".to_owned()], &packages(), &programs());
        assert!(tour.units.is_empty() && tour.programs.is_empty() && !tour.lints);
        assert_eq!(tour.reasons, ["CONTRIBUTING.md: formatting and documents"]);
        // Tests read the API's document.
        assert_eq!(names(&chosen("docs/api.md").units), ["api", "portcullis"]);
    }

    #[test]
    fn dependencies_and_tools_concern_everything() {
        for path in [
            "Cargo.toml",
            "Cargo.lock",
            "clippy.toml",
            ".cargo/config.toml",
        ] {
            let all = chosen(path);
            assert_eq!(all.units.len(), packages().len(), "{path}");
            assert!(all.lints && all.loom && all.clients && all.fuzz);
            assert_eq!(all.programs.len(), programs().len());
        }
        assert_eq!(chosen("fuzz/Cargo.toml").units.len(), 0);
        assert!(chosen("fuzz/fuzz_targets/http_bytes.rs").fuzz);
    }

    #[test]
    fn several_changes_add_up() {
        let paths = ["README.md", "src/cli.rs", "devices/src/legacy/rtc.rs"].map(str::to_owned);
        let all = choose(&paths, &packages(), &programs());
        assert_eq!(names(&all.programs), ["boot", "console", "refused"]);
        assert_eq!(all.reasons.len(), 3);
    }
}
