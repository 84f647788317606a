//! Checks the modules of each crate for cycles: no module imports one that imports it.
//!
//! A module is a file. It uses another module if its code, without tests, has a path to an item of
//! the other: `crate::…`, `super::…`, `self::…`, the name of a child, or a name that `use` imports.
//! Imports and re-exports are followed to the file that defines the item. So a parent that declares
//! children and re-exports their items does not use them; it does when its own code names one. A
//! child that uses an item of its parent, while the parent uses the child, is a cycle. Calls of
//! methods and names inside macros of other crates are not detected.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::path::Path;

use anyhow::Result;

use super::sources::{CRATES, Source};
use super::tally::{Tally, title};
use super::tokens::{is_name, tokens};
use crate::paths;

/// Known cycles: the crate and the modules, sorted, separated by spaces. A new cycle fails the
/// check, and so does a listed one that no longer exists. The aim is an empty list.
const KNOWN: [(&str, &str); 0] = [];

/// Checks every crate.
pub fn check(tally: &mut Tally) {
    const WHAT: &str = "no module imports one that imports it";
    title(WHAT);
    tally.count(
        WHAT,
        cycles(&paths::workspace()).map(|found| compare(&found, &KNOWN)),
    );
}

/// A cycle of modules.
pub struct Cycle {
    /// The crate.
    pub name: &'static str,
    /// All modules that use each other, directly or through others; sorted, separated by spaces.
    pub modules: String,
    /// A shortest cycle, with the name that each module uses of the next one.
    pub way: String,
}

/// The cycles of all crates below `top`.
pub fn cycles(top: &Path) -> Result<Vec<Cycle>> {
    let mut found = Vec::new();
    for member in &CRATES {
        let graph = Graph::new(member.dir, &member.read(top)?);
        for modules in graph.components() {
            found.push(Cycle {
                name: member.name,
                way: graph.way(&modules),
                modules: modules.join(" "),
            });
        }
    }
    Ok(found)
}

/// Prints the differences.
fn compare(found: &[Cycle], known: &[(&str, &str)]) -> bool {
    let mut agree = true;
    for cycle in found {
        if known.contains(&(cycle.name, cycle.modules.as_str())) {
            println!("{}, listed as to be ended: {}", cycle.name, cycle.way);
        } else {
            println!(
                "{}, a cycle: {}\n  in: {}",
                cycle.name, cycle.way, cycle.modules
            );
            agree = false;
        }
    }
    for (name, modules) in known {
        let is_it = |cycle: &Cycle| cycle.name == *name && cycle.modules == *modules;
        if !found.iter().any(is_it) {
            println!("{name}: this cycle has gone, take it from the list: {modules}");
            agree = false;
        }
    }
    agree
}

/// Declarations, imports and names of one file.
#[derive(Default)]
struct Module {
    /// Names that `use` and `mod` declare, with absolute paths below the crate. A name has several
    /// if it depends on the target.
    imports: BTreeMap<String, Vec<Vec<String>>>,
    /// Modules with a glob import.
    globs: Vec<Vec<String>>,
    /// Names of the items that the file defines.
    items: BTreeSet<String>,
    /// Paths in the code outside of `use`.
    paths: BTreeSet<Vec<String>>,
}

/// Modules by path, and their uses: the other module, and the path to it.
struct Graph {
    uses: BTreeMap<String, BTreeMap<String, String>>,
}

impl Graph {
    fn new(dir: &str, sources: &[Source]) -> Self {
        let names: BTreeSet<String> = sources.iter().map(|source| source.module(dir)).collect();
        let modules: BTreeMap<String, Module> = sources
            .iter()
            .map(|source| {
                let path = source.module(dir);
                let module = Module::read(&source.text, &path, &names);
                (path, module)
            })
            .collect();
        let mut uses = BTreeMap::new();
        for (path, module) in &modules {
            let mut found = BTreeMap::new();
            for named in module.all_paths(path) {
                for other in owners(&modules, &named, &mut BTreeSet::new()) {
                    if other != *path {
                        found.entry(other).or_insert_with(|| named.join("::"));
                    }
                }
            }
            uses.insert(path.clone(), found);
        }
        Self { uses }
    }

    /// All modules reachable from one, each with the module from which it is reached first.
    fn reached(&self, from: &str) -> BTreeMap<&str, &str> {
        let mut found = BTreeMap::new();
        let mut next = VecDeque::from([from]);
        while let Some(module) = next.pop_front() {
            let used = self.uses.get_key_value(module);
            for (module, other) in used
                .into_iter()
                .flat_map(|(module, used)| used.keys().map(move |other| (module, other)))
            {
                if !found.contains_key(other.as_str()) {
                    found.insert(other.as_str(), module.as_str());
                    next.push_back(other);
                }
            }
        }
        found
    }

    /// The sets of modules that use each other.
    fn components(&self) -> BTreeSet<Vec<String>> {
        let reached: BTreeMap<&str, _> = self
            .uses
            .keys()
            .map(|module| (module.as_str(), self.reached(module)))
            .collect();
        let mut found = BTreeSet::new();
        for (module, others) in &reached {
            let back = |other: &&&str| {
                reached
                    .get(**other)
                    .is_some_and(|of| of.contains_key(module))
            };
            let component: Vec<String> =
                others.keys().filter(back).map(|name| shown(name)).collect();
            if !component.is_empty() {
                found.insert(component);
            }
        }
        found
    }

    /// A shortest cycle among these modules.
    fn way(&self, modules: &[String]) -> String {
        let mut shortest: Option<Vec<&str>> = None;
        for first in self
            .uses
            .keys()
            .filter(|name| modules.contains(&shown(name)))
        {
            let reached = self.reached(first);
            let mut way = vec![first.as_str()];
            while let Some(from) = reached.get(way[way.len() - 1]) {
                way.push(from);
                if from == first {
                    break;
                }
            }
            if shortest
                .as_ref()
                .is_none_or(|found| way.len() < found.len())
            {
                shortest = Some(way);
            }
        }
        let mut way = shortest.unwrap_or_default();
        way.reverse();
        let mut text = way.first().map_or_else(String::new, |first| shown(first));
        for pair in way.windows(2) {
            text += &format!(" -> {} ({})", shown(pair[1]), self.uses[pair[0]][pair[1]]);
        }
        text
    }
}

/// The module's path, or the name of the root.
fn shown(module: &str) -> String {
    let name = if module.is_empty() { "crate" } else { module };
    name.to_owned()
}

impl Module {
    /// Reads the code of the module `path`; `modules` are those of the crate.
    fn read(text: &str, path: &str, modules: &BTreeSet<String>) -> Self {
        let tokens = tokens(text);
        let mut module = Self::default();
        let scope = Scope { path, modules };
        let mut at = 0;
        while let Some(token) = tokens.get(at) {
            match token.as_str() {
                // Not the `use<'a>` of a type.
                "use" if tokens.get(at + 1).is_none_or(|next| next != "<") => {
                    at += 1;
                    module.read_use(&tokens, &mut at, &[], &scope);
                    continue;
                }
                "mod" => module.read_mod(&tokens, at, &scope),
                "fn" | "struct" | "enum" | "trait" | "const" | "static" | "type" | "union" => {
                    module.items.extend(tokens.get(at + 1).cloned());
                }
                _ if is_name(token)
                    && !(at > 0 && matches!(tokens[at - 1].as_str(), "::" | ".")) =>
                {
                    let mut named = vec![token.clone()];
                    while tokens.get(at + 1).is_some_and(|next| next == "::")
                        && tokens.get(at + 2).is_some_and(|next| is_name(next))
                    {
                        named.push(tokens[at + 2].clone());
                        at += 2;
                    }
                    module.paths.insert(named);
                }
                _ => {}
            }
            at += 1;
        }
        module
    }

    /// Reads one tree of a `use`, which begins at `at`; leaves `at` after it.
    fn read_use(
        &mut self,
        tokens: &[String],
        at: &mut usize,
        prefix: &[String],
        scope: &Scope<'_>,
    ) {
        let mut named = prefix.to_vec();
        let mut alias = None;
        while let Some(token) = tokens.get(*at) {
            *at += 1;
            match token.as_str() {
                "::" => {}
                "{" => {
                    while tokens
                        .get(*at)
                        .is_some_and(|next| next != "}" && next != ";")
                    {
                        self.read_use(tokens, at, &named, scope);
                        if tokens.get(*at).is_some_and(|next| next == ",") {
                            *at += 1;
                        }
                    }
                    *at += 1;
                    return;
                }
                "*" => {
                    self.globs.extend(scope.absolute(&named));
                    return;
                }
                "as" => {
                    alias = tokens.get(*at).cloned();
                    *at += 1;
                }
                "," | "}" | ";" => {
                    *at -= 1;
                    break;
                }
                _ => named.push(token.clone()),
            }
        }
        if named.last().is_some_and(|last| last == "self") {
            named.pop();
        }
        let Some(name) = alias.or_else(|| named.last().cloned()) else {
            return;
        };
        // `mod` lines declare the children.
        let Some(absolute) = scope.absolute(&named).or_else(|| self.through(&named)) else {
            return;
        };
        self.imports.entry(name).or_default().push(absolute);
    }

    fn read_mod(&mut self, tokens: &[String], at: usize, scope: &Scope<'_>) {
        let (Some(name), Some(end)) = (tokens.get(at + 1), tokens.get(at + 2)) else {
            return;
        };
        if end == "{" {
            self.items.insert(name.clone());
            return;
        }
        // `#[path = "file.rs"]`: the tokens of the literal are kept.
        let file = tokens[..at].iter().rev().take_while(|token| *token != ";");
        let file = file
            .filter_map(|token| token.strip_prefix('"')?.strip_suffix(".rs\""))
            .next();
        if let Some(file) = file {
            let mut path = scope.here();
            path.push(file.to_owned());
            let paths = self.imports.entry(name.clone()).or_default();
            // A file in another crate's directory belongs to no module.
            if scope.modules.contains(&path.join("::")) {
                paths.push(path);
            }
        }
    }

    /// The absolute path of a path that begins with an imported name.
    fn through(&self, named: &[String]) -> Option<Vec<String>> {
        let (first, rest) = named.split_first()?;
        let start = self.imports.get(first)?.first()?;
        Some(start.iter().chain(rest).cloned().collect())
    }

    /// Absolute paths that the module uses: its imports, except those that it only re-exports, and
    /// the paths in its code.
    fn all_paths(&self, here: &str) -> BTreeSet<Vec<String>> {
        let mut found: BTreeSet<Vec<String>> = self.globs.iter().cloned().collect();
        let named = |name: &String| self.paths.iter().any(|path| path.first() == Some(name));
        for (name, paths) in &self.imports {
            if named(name) {
                found.extend(paths.iter().cloned());
            }
        }
        for path in &self.paths {
            let first = path[0].as_str();
            if matches!(first, "crate" | "super" | "self") {
                // `pub(super)` uses nothing.
                found.extend(absolute(path, here).filter(|_| path.len() > 1));
            } else if let Some(starts) = self.imports.get(first) {
                let rest = &path[1..];
                found.extend(starts.iter().map(|start| [start, rest].concat()));
            } else if path.len() > 1 {
                // A child, if there is one of that name.
                let mut start = segments(here);
                start.extend(path.iter().cloned());
                found.insert(start);
            }
        }
        found
    }
}

/// The module being read, and all modules of its crate.
struct Scope<'a> {
    path: &'a str,
    modules: &'a BTreeSet<String>,
}

impl Scope<'_> {
    fn here(&self) -> Vec<String> {
        segments(self.path)
    }

    /// The path below the crate; `None` for another crate's path or an imported name's.
    fn absolute(&self, named: &[String]) -> Option<Vec<String>> {
        if let found @ Some(_) = absolute(named, self.path) {
            return found;
        }
        let mut child = self.here();
        child.push(named.first()?.clone());
        self.modules.contains(&child.join("::")).then(|| {
            child.extend(named[1..].iter().cloned());
            child
        })
    }
}

/// A path that begins with `crate`, `super` or `self`, below the crate.
fn absolute(named: &[String], here: &str) -> Option<Vec<String>> {
    let mut start = segments(here);
    let mut rest = named;
    match named.first()?.as_str() {
        "crate" => start.clear(),
        "self" => {}
        "super" => {
            while rest.first().is_some_and(|next| next == "super") {
                start.pop();
                rest = &rest[1..];
            }
            start.extend(rest.iter().cloned());
            return Some(start);
        }
        _ => return None,
    }
    start.extend(rest[1..].iter().cloned());
    Some(start)
}

fn segments(module: &str) -> Vec<String> {
    let parts = module.split("::").filter(|part| !part.is_empty());
    parts.map(str::to_owned).collect()
}

/// The modules that define the item at an absolute path. `seen` contains the paths on the way to
/// this one: imports may form a circle.
fn owners(
    modules: &BTreeMap<String, Module>,
    path: &[String],
    seen: &mut BTreeSet<Vec<String>>,
) -> BTreeSet<String> {
    if !seen.insert(path.to_vec()) {
        return BTreeSet::new();
    }
    let mut at = String::new();
    for (index, segment) in path.iter().enumerate() {
        let next = if at.is_empty() {
            segment.clone()
        } else {
            format!("{at}::{segment}")
        };
        if modules.contains_key(&next) {
            at = next;
            continue;
        }
        let Some(module) = modules.get(&at) else {
            break;
        };
        let rest = &path[index + 1..];
        if let Some(imports) = module.imports.get(segment) {
            let follow = |start: &Vec<String>| owners(modules, &[start, rest].concat(), seen);
            return imports.iter().flat_map(follow).collect();
        }
        if module.items.contains(segment) {
            break;
        }
        for glob in &module.globs {
            let through = owners(modules, glob, seen);
            let has = |owner: &String| modules[owner].items.contains(segment);
            if let Some(owner) = through.into_iter().find(has) {
                return BTreeSet::from([owner]);
            }
        }
        break;
    }
    BTreeSet::from([at])
}

#[cfg(test)]
mod tests {
    use super::super::sources::tests::source;
    use super::*;

    fn found(files: &[(&str, &str)]) -> Vec<String> {
        let sources: Vec<Source> = files
            .iter()
            .map(|(path, text)| source(path, text))
            .collect();
        let graph = Graph::new("a", &sources);
        let components = graph.components();
        components.iter().map(|modules| modules.join(" ")).collect()
    }

    #[test]
    fn modules_that_name_each_other_are_a_cycle() {
        let files = [
            ("a/lib.rs", "mod b;\nmod c;\nmod d;\n"),
            ("a/b.rs", "use crate::c::C;\nfn f(_: C) {}\n"),
            ("a/c.rs", "pub struct C(crate::d::D);"),
            (
                "a/d.rs",
                "use super::{b, c as e};\npub struct D;\nfn g() { b::f(); }\n",
            ),
        ];
        assert_eq!(found(&files), ["b c d"]);
        let sources = files.map(|(path, text)| source(path, text));
        let graph = Graph::new("a", &sources);
        let modules = ["b", "c", "d"].map(str::to_owned);
        let way = graph.way(&modules);
        assert_eq!(way, "b -> c (c::C) -> d (d::D) -> b (b)");
        assert!(found(&files[..3]).is_empty());
    }

    #[test]
    fn a_parent_may_re_export_its_children_but_not_use_one_that_uses_it() {
        let child = ("a/b/c.rs", "use super::B;\npub struct C(B);\n");
        let parent = |text| [("a/lib.rs", "mod b;"), ("a/b/mod.rs", text), child];
        assert!(found(&parent("mod c;\npub use c::C;\npub struct B;\n")).is_empty());
        let used = [
            "mod c;\npub use c::C;\npub struct B;\nfn f() -> C {}",
            "mod c;\npub struct B;\nfn f() { c::g() }",
        ];
        for text in used {
            assert_eq!(found(&parent(text)), ["b b::c"]);
        }
    }

    #[test]
    fn re_exports_and_imports_are_followed_to_the_file_that_defines() {
        let files = [
            ("a/lib.rs", "mod b;\nmod c;\npub use c::{C, deep::*};\n"),
            (
                "a/b.rs",
                "use crate::C;\nuse crate::Deep;\nfn f(_: C, _: Deep) {}\n",
            ),
            (
                "a/c.rs",
                "mod deep;\nuse crate::b;\npub struct C;\nfn g() { b::f() }\n",
            ),
            ("a/c/deep.rs", "pub struct Deep;"),
        ];
        assert_eq!(found(&files), ["b c"]);
    }

    #[test]
    fn other_crates_strings_and_comments_are_no_part_of_the_graph() {
        let files = [
            ("a/lib.rs", "mod b;\nmod c;\n"),
            (
                "a/b.rs",
                "use crate::c::C;\nuse vm::c;\n// crate::c\nfn f<'a>(_: &'a C) -> impl X + use<'a> { '\"' }",
            ),
            (
                "a/c.rs",
                "pub struct C; // crate::b\nconst A: &str = \"crate::b\";\nconst B: &str = r#\"\"crate::b\"#;\nuse b::f;",
            ),
        ];
        assert!(found(&files).is_empty());
    }

    #[test]
    fn a_file_of_another_name_is_the_module_of_its_declaration() {
        let files = [
            (
                "a/lib.rs",
                "#[cfg(x)]\n#[path = \"b.rs\"]\nmod arch;\nmod c;\n",
            ),
            ("a/b.rs", "use crate::c::C;\nfn f(_: C) {}\n"),
            (
                "a/c.rs",
                "use super::arch;\npub struct C;\nfn g() { arch::f() }\n",
            ),
        ];
        assert_eq!(found(&files), ["b c"]);
    }

    #[test]
    fn a_cycle_that_is_new_or_gone_is_an_error() {
        let cycle = || Cycle {
            name: "a",
            modules: "b c".to_owned(),
            way: String::new(),
        };
        assert!(compare(&[cycle()], &[("a", "b c")]));
        assert!(!compare(&[cycle()], &[]));
        assert!(!compare(&[], &[("a", "b c")]));
    }
}
