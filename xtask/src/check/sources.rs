//! The code of the crates, without comments and tests.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

/// A crate of the workspace.
pub struct Crate {
    /// Name of the crate.
    pub name: &'static str,
    /// Directory of its sources, below the workspace.
    pub dir: &'static str,
    /// Whether it is linked into `portcullis`.
    pub product: bool,
}

/// All crates, except the tests of the top directory and the fuzz targets.
pub const CRATES: [Crate; 8] = [
    of_product("portcullis", "src"),
    of_product("iommu", "iommu/src"),
    of_product("devices", "devices/src"),
    of_product("arch", "arch/src"),
    of_product("vmm", "vmm/src"),
    of_product("api", "api/src"),
    Crate {
        name: "xtask",
        dir: "xtask/src",
        product: false,
    },
    Crate {
        name: "guest-driver",
        dir: "tests/guest-driver/src",
        product: false,
    },
];

const fn of_product(name: &'static str, dir: &'static str) -> Crate {
    Crate {
        name,
        dir,
        product: true,
    }
}

/// A source file.
pub struct Source {
    /// Its path below the workspace.
    pub path: String,
    /// Its text; after [`without_tests`] only the code outside tests.
    pub text: String,
}

impl Source {
    /// The path of its module below the crate's directory `dir`: `pci::msi`; empty for the root.
    pub fn module(&self, dir: &str) -> String {
        let path = self.path.strip_prefix(dir).unwrap_or(&self.path);
        stem(path).trim_start_matches('/').replace('/', "::")
    }

    /// Lines that are not blank.
    pub fn lines(&self) -> usize {
        let lines = self.text.lines();
        lines.filter(|line| !line.trim().is_empty()).count()
    }
}

impl Crate {
    /// Reads the sources below `top`, without tests and comments, sorted by path.
    pub fn read(&self, top: &Path) -> Result<Vec<Source>> {
        let mut sources = Vec::new();
        read_sources(top, self.dir, &mut sources)?;
        let mut product = without_tests(sources);
        product.sort_by(|one, other| one.path.cmp(&other.path));
        Ok(product)
    }
}

fn read_sources(top: &Path, dir: &str, sources: &mut Vec<Source>) -> Result<()> {
    for entry in fs::read_dir(top.join(dir)).with_context(|| format!("no {dir}"))? {
        let entry = entry?;
        let name = entry.file_name();
        let path = format!("{dir}/{}", name.display());
        if entry.path().is_dir() {
            read_sources(top, &path, sources)?;
        } else if entry.path().extension().is_some_and(|found| found == "rs") {
            let text = fs::read_to_string(entry.path())?;
            sources.push(Source { path, text });
        }
    }
    Ok(())
}

/// The path without the parts that do not name a module.
fn stem(path: &str) -> &str {
    ["/mod.rs", "/lib.rs", "/main.rs", ".rs"]
        .iter()
        .find_map(|end| path.strip_suffix(end))
        .unwrap_or(path)
}

/// Removes modules and items that only tests use, and comments.
pub fn without_tests(sources: Vec<Source>) -> Vec<Source> {
    let mut tests = Vec::new();
    let mut product = Vec::new();
    for Source { path, text } in sources {
        let mut kept = String::new();
        let mut lines = text.lines();
        while let Some(line) = lines.next() {
            let code = line.trim_start();
            if code.starts_with("#[cfg(") && code.contains("test") && !code.contains("not(test") {
                let indent = &line[..line.len() - code.len()];
                if let Some(name) = skip_item(&mut lines, indent).filter(|_| indent.is_empty()) {
                    tests.push(format!("{}/{name}", stem(&path)));
                }
            } else if !code.starts_with("//") {
                kept += line;
                kept.push('\n');
            }
        }
        product.push(Source { path, text: kept });
    }
    product.retain(|source| {
        let of = |module: &String| {
            let rest = source.path.strip_prefix(module.as_str());
            rest.is_some_and(|rest| rest == ".rs" || rest.starts_with('/'))
        };
        !tests.iter().any(of)
    });
    product
}

/// Skips the item that follows an attribute. Returns its name if it is a module.
fn skip_item<'a>(lines: &mut std::str::Lines<'a>, indent: &str) -> Option<&'a str> {
    // Other attributes and comments may follow the first one.
    let attribute = |line: &str| line.contains("#[") || line.trim_start().starts_with("//");
    let first = lines.find(|line| !attribute(line))?;
    let mut item = first;
    // The head of an item may have several lines.
    let deeper = format!("{indent}    ");
    while !item.ends_with(';') && (!item.ends_with(['{', '}', ',']) || item.starts_with(&deeper)) {
        item = lines.next()?;
    }
    if item.ends_with('{') {
        let end = format!("{indent}}}");
        lines.find(|line| line.starts_with(&end));
    }
    module_name(first)
}

/// The name in `mod name;` or `pub mod name {`.
fn module_name(item: &str) -> Option<&str> {
    let (_, rest) = item.split_once("mod ")?;
    let end = rest.find(|c: char| !c.is_ascii_alphanumeric() && c != '_')?;
    rest.get(..end)
}

#[cfg(test)]
pub mod tests {
    use super::*;

    pub fn source(path: &str, text: &str) -> Source {
        Source {
            path: path.to_owned(),
            text: text.to_owned(),
        }
    }

    #[test]
    fn tests_and_comments_are_no_part_of_the_product() {
        let product = without_tests(vec![
            source("a/lib.rs", "#[cfg(test)]\nmod rig;\nmod b;\n"),
            source("a/rig.rs", "unsafe {}"),
            source("a/rig/deep.rs", "unsafe {}"),
            source(
                "a/b.rs",
                "// unsafe { }\nstruct B {\n    #[cfg(test)]\n    a: Mutex<()>,\n}\n#[cfg(all(test, loom))]\n#[allow(x)]\nmod tests {\n    unsafe {}\n}\nfn f() {}\n",
            ),
        ]);
        let paths: Vec<_> = product.iter().map(|source| source.path.as_str()).collect();
        assert_eq!(paths, ["a/lib.rs", "a/b.rs"]);
        assert_eq!(product[1].text, "struct B {\n}\nfn f() {}\n");
    }

    #[test]
    fn an_item_of_tests_ends_where_its_head_or_body_ends() {
        let text = "#[cfg(test)]\nuse a::{\n    b,\n};\n#[cfg(test)]\n/// Of tests.\nfn f(\n    a: u8,\n) -> u8 {\n    1\n}\n\
                    impl A {\n    #[cfg(test)]\n    fn g(&self) {}\n\n    fn h(&self) {}\n}\n";
        let product = without_tests(vec![source("a/lib.rs", text)]);
        assert_eq!(product[0].text, "impl A {\n\n    fn h(&self) {}\n}\n");
        assert_eq!(product[0].lines(), 3);
    }

    #[test]
    fn a_module_has_the_path_of_its_file() {
        let module = |path| source(path, "").module("a/src");
        assert_eq!(module("a/src/lib.rs"), "");
        assert_eq!(module("a/src/pci/mod.rs"), "pci");
        assert_eq!(module("a/src/pci/msi.rs"), "pci::msi");
    }
}
