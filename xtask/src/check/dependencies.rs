//! Checks licences and duplicates of the dependencies against the lists in `deny.toml`, and its
//! other rules where `cargo deny` is installed.

use std::collections::BTreeMap;
use std::fs;
use std::process::Command;

use anyhow::{Context, Result};
use serde_json::Value;

use super::tally::{Tally, title};
use crate::packages::output;
use crate::paths;
use crate::product;

/// Checks the packages of `Cargo.lock`.
pub fn check(tally: &mut Tally) {
    const WHAT: &str = "licences and duplicates of dependencies";
    title(WHAT);
    tally.count(WHAT, lists().and_then(|lists| lists.agree(&packages()?)));
    const DENY: &str = "cargo deny";
    let mut version = Command::new(product::cargo());
    if output(version.args(["deny", "--version"])).is_err() {
        return tally.leave_out(format!(
            "{DENY} (advisories, sources, yanked versions): it is not installed"
        ));
    }
    title(DENY);
    let mut deny = Command::new(product::cargo());
    deny.current_dir(paths::workspace()).args(["deny", "check"]);
    let status = deny.status().context("cannot run cargo deny");
    tally.count(DENY, status.map(|status| status.success()));
}

/// A package of the dependency graph.
struct Package {
    name: String,
    version: String,
    /// SPDX expression; empty if the package names none.
    license: String,
}

fn packages() -> Result<Vec<Package>> {
    let mut cargo = Command::new(product::cargo());
    cargo
        .current_dir(paths::workspace())
        .args(["metadata", "--locked", "--format-version", "1"]);
    let value: Value = serde_json::from_str(&output(&mut cargo)?).context("cargo metadata")?;
    let packages = value["packages"].as_array().into_iter().flatten();
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let package = |value: &Value| Package {
        name: text(&value["name"]),
        version: text(&value["version"]),
        license: text(&value["license"]),
    };
    Ok(packages.map(package).collect())
}

/// The lists of `deny.toml`.
struct Lists {
    /// Permitted licences.
    allow: Vec<String>,
    /// `name@version` of known duplicates.
    skip: Vec<String>,
}

fn lists() -> Result<Lists> {
    let path = paths::workspace().join("deny.toml");
    let text = fs::read_to_string(&path).with_context(|| format!("no {}", path.display()))?;
    Ok(Lists {
        allow: list(&text, "allow"),
        skip: list(&text, "skip"),
    })
}

/// The strings of a list with one line for each.
fn list(text: &str, name: &str) -> Vec<String> {
    let start = format!("{name} = [");
    text.lines()
        .skip_while(|line| *line != start)
        .skip(1)
        .take_while(|line| *line != "]")
        .filter_map(|line| Some(line.split('"').nth(1)?.to_owned()))
        .collect()
}

impl Lists {
    /// Prints packages that the lists do not permit, and list entries without a package.
    fn agree(&self, packages: &[Package]) -> Result<bool> {
        anyhow::ensure!(!packages.is_empty(), "cargo names no package");
        let mut agree = true;
        let mut versions: BTreeMap<&str, Vec<String>> = BTreeMap::new();
        for Package {
            name,
            version,
            license,
        } in packages
        {
            if !self.allows(license) {
                println!("{name} {version}: its licence {license:?} is not in deny.toml");
                agree = false;
            }
            versions
                .entry(name)
                .or_default()
                .push(format!("{name}@{version}"));
        }
        let listed = |version: &&String| self.skip.contains(version);
        for all in versions.values() {
            if all.iter().filter(|version| !listed(version)).count() > 1 {
                println!("two versions of a package: {}", all.join(", "));
                agree = false;
            }
        }
        let is_duplicate = |known: &&String| {
            let of = versions.values().find(|all| all.contains(known));
            of.is_some_and(|all| all.len() > 1)
        };
        for known in self.skip.iter().filter(|known| !is_duplicate(known)) {
            println!("{known} is no duplicate, take it from deny.toml");
            agree = false;
        }
        Ok(agree)
    }

    /// True if the permitted licences satisfy an SPDX expression. `/` is an old `OR`.
    fn allows(&self, license: &str) -> bool {
        let spaced = license
            .replace('/', " OR ")
            .replace('(', " ( ")
            .replace(')', " ) ");
        let words: Vec<&str> = spaced.split_whitespace().collect();
        let mut rest = words.as_slice();
        self.any(&mut rest) && rest.is_empty()
    }

    fn any(&self, words: &mut &[&str]) -> bool {
        let mut met = self.all(words);
        while let ["OR", rest @ ..] = *words {
            *words = rest;
            met |= self.all(words);
        }
        met
    }

    fn all(&self, words: &mut &[&str]) -> bool {
        let mut met = self.one(words);
        while let ["AND", rest @ ..] = *words {
            *words = rest;
            met &= self.one(words);
        }
        met
    }

    fn one(&self, words: &mut &[&str]) -> bool {
        let Some((first, rest)) = words.split_first() else {
            return false;
        };
        *words = rest;
        if *first != "(" {
            let mut license = (*first).to_owned();
            if let ["WITH", exception, rest @ ..] = *words {
                *words = rest;
                license += " WITH ";
                license += exception;
            }
            return self.allow.contains(&license);
        }
        let met = self.any(words);
        if let [")", rest @ ..] = *words {
            *words = rest;
        }
        met
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lists() -> Lists {
        let text = "# allow\n[licenses]\nallow = [\n    \"MIT\",\n    \"Unicode-3.0\",\n]\nskip = [\n    \"a@1.0.0\",\n]\n";
        Lists {
            allow: list(text, "allow"),
            skip: list(text, "skip"),
        }
    }

    fn package(name: &str, version: &str) -> Package {
        Package {
            name: name.to_owned(),
            version: version.to_owned(),
            license: "MIT".to_owned(),
        }
    }

    #[test]
    fn an_or_of_licences_needs_one_and_an_and_needs_all() {
        for license in [
            "MIT",
            "GPL-2.0 OR MIT",
            "MIT/GPL-2.0",
            "(GPL-2.0 OR MIT) AND Unicode-3.0",
            "GPL-2.0 WITH x OR GPL-2.0 OR MIT",
        ] {
            assert!(lists().allows(license), "{license}");
        }
        for license in ["", "GPL-2.0", "MIT AND GPL-2.0", "MIT WITH x"] {
            assert!(!lists().allows(license), "{license}");
        }
    }

    #[test]
    fn duplicates_are_known_or_an_error() {
        let agree = |versions: &[(&str, &str)]| {
            let packages: Vec<_> = versions
                .iter()
                .map(|(name, version)| package(name, version))
                .collect();
            lists().agree(&packages).unwrap()
        };
        assert!(agree(&[("a", "1.0.0"), ("a", "2.0.0"), ("b", "1.0.0")]));
        assert!(!agree(&[("a", "1.0.0"), ("a", "2.0.0"), ("a", "3.0.0")]));
        assert!(!agree(&[
            ("a", "1.0.0"),
            ("a", "2.0.0"),
            ("b", "1.0.0"),
            ("b", "2.0.0")
        ]));
        assert!(!agree(&[("a", "1.0.0")]));
    }
}
