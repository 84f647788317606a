//! Checks documents that list parts of the code: threads, locks, files with `unsafe` code.
//!
//! Each list is a table under its own heading, with names in backticks in the first cell of each
//! row. A name in only one of code and table is an error.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;

use anyhow::{Context, Result};

use super::sources::{CRATES, Source};
use super::tally::{Tally, title};
use crate::paths;

/// The lists: their objects, the document, its heading, and the function that finds them in the
/// code.
const LISTS: [(&str, &str, &str, Found); 3] = [
    ("threads", "docs/architecture.md", "Threads", threads),
    ("locks", "docs/architecture.md", "Locks", locks),
    (
        "unsafe code",
        "docs/security.md",
        "Unsafe code",
        unsafe_code,
    ),
];

/// The document and the heading below which backticks contain names of functions.
const FLOWS: (&str, &str) = ("docs/architecture.md", "Four flows");

/// Finds names in a file of the product, each with its position.
type Found = fn(&str, &str) -> Vec<(String, String)>;

/// Compares each list with the code.
pub fn check(tally: &mut Tally) {
    for (what, document, heading, found) in LISTS {
        let what = format!("list of {what} in {document}");
        title(&what);
        tally.count(&what, compare(document, heading, found));
    }
    let what = "ranks of locks in docs/architecture.md";
    title(what);
    tally.count(what, check_ranks());
    let what = format!("functions named in {}", FLOWS.0);
    title(&what);
    tally.count(&what, check_flows());
}

/// Checks that each function that the flows name exists.
fn check_flows() -> Result<bool> {
    let top = paths::workspace();
    let (document, heading) = FLOWS;
    let text = fs::read_to_string(top.join(document));
    let text = text.with_context(|| format!("no {document}"))?;
    let names = functions(below(&text, heading));
    let mut missing: BTreeSet<&str> = names.iter().copied().collect();
    for product in CRATES.iter().filter(|found| found.product) {
        for source in product.read(&top)? {
            missing.retain(|name| !defines(&source, product.dir, name));
        }
    }
    for name in &missing {
        println!("{document}, \"{heading}\": the code has no `{name}`");
    }
    anyhow::ensure!(
        !names.is_empty(),
        "no function is named below \"{heading}\""
    );
    Ok(missing.is_empty())
}

/// Checks that each lock whose type has a rank has it in the table too.
fn check_ranks() -> Result<bool> {
    let top = paths::workspace();
    let document = "docs/architecture.md";
    let text = fs::read_to_string(top.join(document));
    let text = text.with_context(|| format!("no {document}"))?;
    let listed: BTreeMap<&str, &str> = below(&text, "Locks").flat_map(ranks).collect();
    let mut agree = true;
    for product in CRATES.iter().filter(|found| found.product) {
        for source in product.read(&top)? {
            for (name, _) in locks(&source.path, &source.text) {
                let Some(rank) = rank_of(&source.text, &name) else {
                    continue;
                };
                if listed.get(name.as_str()) != Some(&rank) {
                    println!("{document}: `{name}` has rank {rank} ({})", source.path);
                    agree = false;
                }
            }
        }
    }
    Ok(agree)
}

/// The names in the first cell of a row, each with the second cell.
fn ranks(row: &str) -> Vec<(&str, &str)> {
    let mut cells = row.split('|').skip(1).map(str::trim);
    let (names, rank) = (cells.next(), cells.next());
    let names = names.unwrap_or_default().split('`').skip(1).step_by(2);
    names.map(|name| (name, rank.unwrap_or_default())).collect()
}

/// The number in the type of the field of a lock.
fn rank_of<'a>(text: &'a str, lock: &str) -> Option<&'a str> {
    let field = format!(" {}: ", lock.rsplit("::").next()?);
    let mut lines = text.lines();
    let line = lines.find(|line| line.contains(&field) && line.contains("Ranked"))?;
    let rank = line.rsplit_once(", ")?.1.trim_end_matches(['>', ',']);
    rank.bytes()
        .all(|byte| byte.is_ascii_digit())
        .then_some(rank)
}

/// Returns names like `module::function` in backticks.
fn functions<'a>(lines: impl Iterator<Item = &'a str>) -> Vec<&'a str> {
    let quoted = lines.flat_map(|line| line.split('`').skip(1).step_by(2));
    quoted.filter(|name| name.contains("::")).collect()
}

/// True if `source` is the module of `name`, by the last part of its path, and has the function.
fn defines(source: &Source, dir: &str, name: &str) -> bool {
    let module = source.module(dir);
    name.rsplit_once("::").is_some_and(|(of, function)| {
        module.rsplit("::").next() == Some(of)
            && ["(", "<"]
                .iter()
                .any(|next| source.text.contains(&format!("fn {function}{next}")))
    })
}

fn compare(document: &str, heading: &str, found: Found) -> Result<bool> {
    let top = paths::workspace();
    let mut code: BTreeMap<String, String> = BTreeMap::new();
    for product in CRATES.iter().filter(|found| found.product) {
        for source in product.read(&top)? {
            code.extend(found(&source.path, &source.text));
        }
    }
    let path = top.join(document);
    let text = fs::read_to_string(&path).with_context(|| format!("no {document}"))?;
    let listed = table(&text, heading);
    let mut agree = true;
    for (name, place) in code.iter().filter(|(name, _)| !listed.contains(*name)) {
        println!("{document}, \"{heading}\": `{name}` is missing ({place})");
        agree = false;
    }
    for name in listed.iter().filter(|name| !code.contains_key(*name)) {
        println!("{document}, \"{heading}\": the code has no `{name}`");
        agree = false;
    }
    Ok(agree)
}

/// The lines below a heading of the second level, up to the next one.
fn below<'a>(document: &'a str, heading: &str) -> impl Iterator<Item = &'a str> {
    let start = format!("## {heading}");
    document
        .lines()
        .skip_while(move |line| !line.starts_with(&start))
        .skip(1)
        .take_while(|line| !line.starts_with("## "))
}

/// The names in backticks in the first cells of the rows below a heading.
fn table(document: &str, heading: &str) -> BTreeSet<String> {
    below(document, heading)
        .filter_map(|line| line.strip_prefix("| `"))
        .flat_map(|line| {
            let cell = line.split(" |").next().unwrap_or_default();
            cell.split('`').step_by(2).map(str::to_owned)
        })
        .collect()
}

/// Returns names of threads: `vcpu*` for `format!("vcpu{index}")`; a thread without a name is `(no
/// name)`.
fn threads(path: &str, text: &str) -> Vec<(String, String)> {
    const BUILDER: &str = "Builder::new()";
    const KIND: &str = "spawn(ThreadKind::";
    let mut found = Vec::new();
    // Its callers name the threads.
    if path == "devices/src/thread.rs" {
        return found;
    }
    let starts = [BUILDER, "thread::spawn(", KIND];
    for (at, start) in starts.iter().flat_map(|start| text.match_indices(start)) {
        let of_another_name = |c: char| c.is_ascii_alphanumeric() || c == '_';
        if text[..at].ends_with(of_another_name) {
            continue;
        }
        let rest = &text[at + start.len()..];
        // A later thread has its own name.
        let end = rest.find("spawn(").unwrap_or(rest.len());
        let argument = match start {
            KIND => rest[..end].split_once(','),
            BUILDER => rest[..end].split_once(".name("),
            _ => None,
        };
        let name = argument.and_then(|(_, argument)| {
            let literal = argument.split('"').nth(1)?;
            Some(match literal.split_once('{') {
                Some((prefix, _)) => format!("{prefix}*"),
                None => literal.to_owned(),
            })
        });
        found.push((
            name.unwrap_or_else(|| "(no name)".to_owned()),
            path.to_owned(),
        ));
    }
    found
}

/// Returns locks as `module::Owner::field`, with the last module's name: the fields whose type
/// contains a `Mutex` or `RwLock`.
fn locks(path: &str, text: &str) -> Vec<(String, String)> {
    let base = path.trim_end_matches(".rs").trim_end_matches("/mod");
    let module = base.rsplit('/').next().unwrap_or(base);
    let mut found = Vec::new();
    let mut find = |name: String| found.push((format!("{module}::{name}"), path.to_owned()));
    let mut owner = None;
    for line in text.lines() {
        let is_lock = line.contains("Mutex<") || line.contains("RwLock<");
        if let Some((visibility, rest)) = line.split_once("struct ")
            && (visibility.is_empty() || visibility.starts_with("pub"))
        {
            let end = rest.find(|c: char| !c.is_ascii_alphanumeric());
            let name = &rest[..end.unwrap_or(rest.len())];
            // A ranked lock itself is a lock only as a field.
            if is_lock && rest.contains('(') && !name.starts_with("Ranked") {
                find(name.to_owned());
            }
            owner = rest.ends_with('{').then(|| name.to_owned());
        } else if line.starts_with('}') {
            owner = None;
        } else if let (Some(owner), true) = (&owner, is_lock) {
            let field = line.split(':').next().unwrap_or_default();
            let field = field.rsplit(' ').next().unwrap_or_default();
            find(format!("{owner}::{field}"));
        } else if is_lock && line.contains("static ") {
            let name = line.split("static ").nth(1).unwrap_or_default();
            let name = name.split(':').next().unwrap_or_default();
            find(name.to_owned());
        }
    }
    found
}

/// Returns files with `unsafe` code, or that lift the lint that denies it.
fn unsafe_code(path: &str, text: &str) -> Vec<(String, String)> {
    let marks = [
        "unsafe {",
        "unsafe fn ",
        "unsafe impl ",
        "unsafe extern ",
        "allow(unsafe_code",
        "expect(unsafe_code",
    ];
    let has = text
        .lines()
        .any(|line| marks.iter().any(|mark| line.contains(mark)));
    let named = has.then(|| (path.to_owned(), path.to_owned()));
    named.into_iter().collect()
}

#[cfg(test)]
mod tests {
    use super::super::sources::tests::source;
    use super::*;

    fn names(found: Vec<(String, String)>) -> Vec<String> {
        found.into_iter().map(|(name, _)| name).collect()
    }

    #[test]
    fn a_table_is_read_below_its_heading_only() {
        let text = "## Threads\nThe `x` is not one.\n| thread | |\n|---|---|\n| `api`, `b` | serves `y` |\n\
                    ## Locks, outermost first\n| `Gate` | |\n";
        assert_eq!(
            table(text, "Threads"),
            ["api", "b"].map(str::to_owned).into()
        );
        assert_eq!(table(text, "Locks"), ["Gate".to_owned()].into());
        assert!(table(text, "Others").is_empty());
    }

    #[test]
    fn ranks_are_read_from_the_table_and_from_types() {
        assert_eq!(
            ranks("| `a::B::c`, `d::E` | 4 | data |"),
            [("a::B::c", "4"), ("d::E", "4")]
        );
        let text = "struct B {\n    c: Vec<RankedMutex<Map<u8, u8>, 12>>,\n    d: LeafMutex<u8>,\n    pub e: RankedRwLock<u8, LEAF>,\n}\n";
        assert_eq!(rank_of(text, "a::B::c"), Some("12"));
        assert_eq!(rank_of(text, "a::B::d"), None);
        assert_eq!(rank_of(text, "a::B::e"), None);
    }

    #[test]
    fn functions_of_flows_are_found_in_their_modules() {
        let text =
            "## Four flows\n### One\n`a::run` takes `Action`, then `b::f`.\n## Next\n`c::g`\n";
        assert_eq!(functions(below(text, "Four flows")), ["a::run", "b::f"]);
        let source = source("x/src/y/a.rs", "impl A {\n    fn run<T>(t: T) {}\n}\n");
        assert!(defines(&source, "x/src", "a::run"));
        assert!(!defines(&source, "x/src", "a::ru"));
        assert!(!defines(&source, "x/src", "b::run"));
    }

    #[test]
    fn threads_are_found_by_the_names_that_they_get() {
        let text = "let t = thread::Builder::new().name(format!(\"disk-{}\", id));\nt.spawn(work)\n\
                    std::thread::Builder::new()\n    .name(\"api\".to_owned())\n    .spawn(run)\n\
                    thread::spawn(move || a.name(\"no\"));\n    let t = spawn(ThreadKind::Vcpu, format!(\"vcpu{index}\"), work);\nBuilder::new().spawn(f)\nFunctionBuilder::new()";
        let found = names(threads("a.rs", text));
        assert_eq!(found, ["disk-*", "api", "(no name)", "(no name)", "vcpu*"]);
    }

    #[test]
    fn locks_are_found_with_their_owners() {
        let text = "pub struct Gate(RwLock<()>);\nstruct Bus {\n    name: u8,\n    pub ranges: Arc<RwLock<Ranges>>,\n}\n\
                    fn f(a: &Mutex<u8>) {}\nstatic ONE: Mutex<()> = Mutex::new(());\n\
                    struct Plain;\nfn g() -> Mutex<u8> {\n    let a: Mutex<u8> = x;\n}\n";
        assert_eq!(
            names(locks("iommu/src/a/mod.rs", text)),
            ["a::Gate", "a::Bus::ranges", "a::ONE"]
        );
    }

    #[test]
    fn unsafe_code_is_found_by_blocks_and_lifted_lints() {
        assert!(unsafe_code("a/b.rs", "struct B {\n}\nfn f() {}\n").is_empty());
        assert_eq!(names(unsafe_code("c.rs", "    unsafe { f() }")), ["c.rs"]);
    }
}
