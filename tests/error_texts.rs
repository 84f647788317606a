//! Checks the texts of all errors of the product: an error never repeats its source, and no field
//! that holds the source is missing from the chain. Reads the sources, so that a new error is
//! checked without being listed here.

use std::ffi::OsStr;
use std::fs;
use std::io::Read as _;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

/// The directories of product code.
const SOURCES: [&str; 6] = [
    "src",
    "api/src",
    "arch/src",
    "devices/src",
    "iommu/src",
    "vmm/src",
];

/// An `#[error(…)]` attribute and the variant or structure below it.
struct ErrorText {
    attribute: String,
    item: String,
}

struct Field {
    /// Name as in a format string: an identifier or an index.
    name: String,
    is_source: bool,
    holds_error: bool,
}

#[test]
fn no_error_repeats_or_loses_its_source() {
    let mut found = 0;
    let mut faults = Vec::new();
    for file in SOURCES.iter().flat_map(rust_files) {
        let code = product_code(&fs::read_to_string(&file).unwrap());
        for text in error_texts(&code) {
            found += 1;
            let problem = text.faults().into_iter();
            faults.extend(problem.map(|problem| format!("{}: {problem}", file.display())));
        }
    }
    assert!(found > 60, "only {found} error texts were found");
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}

/// Checks that errors are printed with `Chain`, which adds their sources.
#[test]
fn every_error_is_printed_with_its_sources() {
    let mut faults = Vec::new();
    for file in ["src", "api/src", "vmm/src"].iter().flat_map(rust_files) {
        let code = product_code(&fs::read_to_string(&file).unwrap());
        for name in ["error", "err", "other", "source"] {
            if code.contains(&format!("{name}.to_string()")) {
                let fix = format!("use Chain(&{name}).to_string()");
                faults.push(format!("{}: {fix}", file.display()));
            }
        }
    }
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}

/// The limit of open files fails a different step at each value: every step reports it once, with
/// the fix, and leaves no socket.
#[test]
fn every_step_without_a_descriptor_reports_it_once_with_the_fix() {
    let directory = std::env::temp_dir().join(format!("portcullis-files-{}", std::process::id()));
    fs::create_dir(&directory).unwrap();
    let socket = directory.join("s");
    let mut refused = 0;
    for limit in 6..64 {
        let mut server = Command::new("sh")
            .args(["-c", "ulimit -n $0 && exec \"$@\"", &limit.to_string()])
            .arg(env!("CARGO_BIN_EXE_portcullis"))
            .args([OsStr::new("serve"), OsStr::new("--api-socket")])
            .arg(&socket)
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let ended = loop {
            if let Some(status) = server.try_wait().unwrap() {
                break Some(status);
            }
            if UnixStream::connect(&socket).is_ok() {
                break None;
            }
            thread::sleep(Duration::from_millis(5));
        };
        let Some(status) = ended else {
            server.kill().unwrap();
            server.wait().unwrap();
            break;
        };
        refused += 1;
        let mut output = String::new();
        server.stderr.unwrap().read_to_string(&mut output).unwrap();
        assert!(!status.success(), "{limit}: {output}");
        assert_eq!(output.lines().count(), 1, "{limit}: {output}");
        for once in ["Too many open files", "raise the limit of open files"] {
            assert_eq!(output.matches(once).count(), 1, "{limit}: {output}");
        }
        assert!(!socket.exists(), "{limit}: {output}");
    }
    fs::remove_dir_all(&directory).unwrap();
    assert!((4..50).contains(&refused), "{refused} limits were refused");
}

#[test]
fn the_check_sees_each_fault() {
    let of = |code: &str| {
        let texts = error_texts(&product_code(code)).into_iter();
        texts.flat_map(|text| text.faults()).collect::<Vec<_>>()
    };
    for repeated in [
        r#"#[error("a: {0}")] A(#[source] io::Error),"#,
        r#"#[error("a: {0:?}")] A(#[from] io::Error),"#,
        r#"#[error("a: {source}")] A { path: String, source: io::Error },"#,
        r#"#[error("a: {why}")] A { #[source] why: io::Error },"#,
        r#"#[error("a: {}", .0)] A(#[source] io::Error),"#,
        r#"#[error("{field}: {source}")] pub struct A { field: u8, source: io::Error }"#,
    ] {
        assert_eq!(of(repeated).len(), 1, "{repeated}");
    }
    for lost in [
        r#"#[error("a")] A(io::Error),"#,
        r#"#[error("a: {0}")] A(KernelError),"#,
        r#"#[error("a")] A { path: String, why: Box<dyn Error> },"#,
    ] {
        assert_eq!(of(lost).len(), 1, "{lost}");
    }
    for good in [
        r#"#[error("a {0}")] A(String, #[source] io::Error),"#,
        r#"#[error("a (b)")] A(#[source] io::Error), #[error("{0}")] B(u8),"#,
        "#[error(transparent)] A(#[from] io::Error),",
        r#"#[error("{path}", path = .kind.path())] A { kind: Kind, source: io::Error },"#,
    ] {
        assert!(of(good).is_empty(), "{good}: {:?}", of(good));
    }
}

impl ErrorText {
    fn faults(&self) -> Vec<String> {
        if self.attribute == "transparent" {
            return Vec::new();
        }
        let attribute = &self.attribute;
        let mut faults = Vec::new();
        for field in fields(&self.item) {
            let name = &field.name;
            if field.is_source && mentions(attribute, name) {
                faults.push(format!("#[error({attribute})] repeats its source {name}"));
            }
            if field.holds_error && !field.is_source {
                faults.push(format!(
                    "#[error({attribute})]: mark field {name} as #[source]"
                ));
            }
        }
        faults
    }
}

/// Whether a format string, or an argument after it, uses a field.
fn mentions(attribute: &str, name: &str) -> bool {
    let ends = |rest: &str| !rest.starts_with(|c: char| c.is_alphanumeric() || c == '_');
    let after = |start: String| {
        let rest = attribute.split(&start).skip(1);
        rest.filter(|rest| ends(rest)).count() > 0
    };
    after(format!("{{{name}")) || after(format!(" .{name}"))
}

fn error_texts(code: &str) -> Vec<ErrorText> {
    let mut texts = Vec::new();
    let mut rest = code;
    while let Some((_, after)) = rest.split_once("#[error(") {
        let end = closing(after);
        let attribute = after[..end].trim().to_owned();
        rest = after[end..].trim_start_matches(")]");
        let item = item(rest).to_owned();
        texts.push(ErrorText { attribute, item });
    }
    texts
}

/// The variant or structure at the start of `code`, with its fields.
fn item(code: &str) -> &str {
    let start = code
        .find(['(', '{', ',', ';', '}'])
        .expect("an item follows");
    match code.as_bytes()[start] {
        b'(' | b'{' => {
            let fields = start + 1;
            &code[..fields + closing(&code[fields..]) + 1]
        }
        _ => &code[..start],
    }
}

fn fields(item: &str) -> Vec<Field> {
    let Some(start) = item.find(['(', '{']) else {
        return Vec::new();
    };
    let named = item.as_bytes()[start] == b'{';
    let body = &item[start + 1..item.len() - 1];
    let parts = split_fields(body).into_iter().enumerate();
    parts
        .map(|(index, text)| {
            let bare = text.replace("#[source]", "").replace("#[from]", "");
            let (name, kind) = match bare.split_once(':') {
                Some((name, kind)) if named => {
                    (name.trim().trim_start_matches("pub ").to_owned(), kind)
                }
                _ => (index.to_string(), bare.as_str()),
            };
            let mut words = kind.split(|c: char| !c.is_alphanumeric());
            Field {
                is_source: bare.len() != text.len() || name == "source",
                holds_error: words.any(|word| word.ends_with("Error")),
                name,
            }
        })
        .collect()
}

fn split_fields(body: &str) -> Vec<String> {
    let mut depth = 0;
    let mut parts = vec![String::new()];
    for character in body.chars() {
        match character {
            '<' | '(' | '[' => depth += 1,
            '>' | ')' | ']' => depth -= 1,
            _ => {}
        }
        if character == ',' && depth == 0 {
            parts.push(String::new());
        } else if let Some(part) = parts.last_mut() {
            part.push(character);
        }
    }
    parts.retain(|part| !part.trim().is_empty());
    parts
}

/// Position of the bracket that closes the one to the left of `code`.
fn closing(code: &str) -> usize {
    let mut depth = 0;
    let mut in_string = false;
    let mut escaped = false;
    for (at, character) in code.char_indices() {
        match character {
            _ if escaped => escaped = false,
            '\\' if in_string => escaped = true,
            '"' => in_string = !in_string,
            _ if in_string => {}
            '(' | '{' | '[' => depth += 1,
            ')' | '}' | ']' if depth == 0 => return at,
            ')' | '}' | ']' => depth -= 1,
            _ => {}
        }
    }
    panic!("a bracket is not closed: {code}");
}

/// A file without its comment lines and its tests.
fn product_code(text: &str) -> String {
    let text = text.split("#[cfg(test)]\nmod ").next().unwrap_or(text);
    let lines = text.lines().map(|line| {
        let comment = line
            .find("///")
            .or(line.trim().starts_with("//").then_some(0));
        comment.map_or(line, |at| &line[..at])
    });
    lines.collect::<Vec<_>>().join("\n")
}

fn rust_files(directory: impl AsRef<str>) -> Vec<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join(directory.as_ref());
    let mut files = Vec::new();
    let mut open = vec![root];
    while let Some(directory) = open.pop() {
        for entry in fs::read_dir(&directory).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            if path.is_dir() && name != "tests" {
                open.push(path);
            } else if name.ends_with(".rs") && name != "tests.rs" {
                files.push(path);
            }
        }
    }
    files
}
