//! Kernel arguments that suit other machines and hide the devices or the console of this one (Linux
//! `Documentation/admin-guide/kernel-parameters.txt`).
//!
//! Clients of Firecracker's API send `pci=off` and `nomodule` with every guest,
//! because its devices are on no PCI bus and its kernels have their drivers built
//! in. `iommu=off` is not among them: it switches off the processor vendors'
//! IOMMUs and x86's bounce buffers, not a virtio-iommu or an SMMUv3.

/// An argument and its effect on the guest.
struct Argument {
    /// The only architecture on which Linux reads it; `None` for both.
    arch: Option<&'static str>,
    /// The text up to `=`, or the whole word.
    name: &'static str,
    /// One of the comma-separated values; empty if the argument has none.
    value: &'static str,
    /// Effect on the guest, for the log.
    effect: &'static str,
}

const X86: Option<&str> = Some("x86_64");
const ARM: Option<&str> = Some("aarch64");

const NO_PCI: &str = "hides all devices, which are PCI functions";
const NO_ACPI: &str = "hides all devices: ACPI tables alone describe this machine";
const NO_MSI: &str = "hides all devices, which have MSI-X interrupts only";
const NO_IOAPIC: &str = "leaves the console without its interrupt";
const NO_LAPIC: &str = "leaves the guest without a timer and without interrupts of its devices";
const NO_MODULES: &str = "hides the devices whose drivers, or that of their IOMMU, are modules";

#[rustfmt::skip]
const ARGUMENTS: [Argument; 12] = [
    Argument { arch: None, name: "pci", value: "off", effect: NO_PCI },
    Argument { arch: X86, name: "pci", value: "conf1", effect: NO_PCI },
    Argument { arch: X86, name: "pci", value: "nommconf", effect: NO_PCI },
    Argument { arch: None, name: "pci", value: "nomsi", effect: NO_MSI },
    Argument { arch: X86, name: "acpi", value: "off", effect: NO_ACPI },
    Argument { arch: X86, name: "acpi", value: "noirq", effect: NO_IOAPIC },
    Argument { arch: ARM, name: "acpi", value: "force", effect: "hides all devices: this machine has no ACPI tables" },
    Argument { arch: X86, name: "noapic", value: "", effect: NO_IOAPIC },
    Argument { arch: X86, name: "nolapic", value: "", effect: NO_LAPIC },
    Argument { arch: X86, name: "disableapic", value: "", effect: NO_LAPIC },
    Argument { arch: None, name: "nomodule", value: "", effect: NO_MODULES },
    Argument { arch: None, name: "nomodules", value: "", effect: NO_MODULES },
];

impl Argument {
    fn find(arch: &str, name: &str, value: &str) -> Option<&'static Self> {
        let here = |argument: &&Self| argument.arch.is_none_or(|only| only == arch);
        let mut arguments = ARGUMENTS.iter().filter(here);
        arguments.find(|argument| argument.name == name && argument.value == value)
    }
}

/// An argument of a command line that does not suit the machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Unsuitable {
    /// The argument alone, as Linux reads it: `pci=off`.
    pub argument: String,
    /// Effect on the guest.
    pub effect: &'static str,
}

/// Splits `command_line` into the part that suits a machine of `arch` and the unsuitable arguments.
/// Without any, it is returned unchanged.
///
/// Words are separated by spaces outside double quotes. Words after `--` belong to the guest's
/// init.
pub(super) fn split(arch: &str, command_line: &str) -> (String, Vec<Unsuitable>) {
    let mut unsuitable = Vec::new();
    let mut quoted = false;
    let mut for_init = false;
    let words = command_line.split(|character: char| {
        quoted ^= character == '"';
        character == ' ' && !quoted
    });
    let words: Vec<&str> = words.collect();
    let kept = words.into_iter().filter_map(|word| {
        for_init |= word == "--";
        if for_init {
            return Some(word.to_owned());
        }
        fitting(arch, word, &mut unsuitable)
    });
    let kept: Vec<String> = kept.collect();
    if unsuitable.is_empty() {
        return (command_line.to_owned(), unsuitable);
    }
    (kept.join(" "), unsuitable)
}

/// Returns the part of `word` that suits, if any; appends the rest to `unsuitable`.
fn fitting(arch: &str, word: &str, unsuitable: &mut Vec<Unsuitable>) -> Option<String> {
    let Some((name, values)) = word.split_once('=') else {
        let found = Argument::find(arch, word, "");
        unsuitable.extend(found.map(|argument| Unsuitable {
            argument: word.to_owned(),
            effect: argument.effect,
        }));
        return found.is_none().then(|| word.to_owned());
    };
    let fits = |value: &&str| match Argument::find(arch, name, value) {
        Some(argument) if !value.is_empty() => {
            unsuitable.push(Unsuitable {
                argument: format!("{name}={value}"),
                effect: argument.effect,
            });
            false
        }
        _ => true,
    };
    let kept: Vec<&str> = values.split(',').filter(fits).collect();
    (!kept.is_empty()).then(|| format!("{name}={}", kept.join(",")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kept(arch: &str, command_line: &str) -> (String, Vec<String>) {
        let (kept, unsuitable) = split(arch, command_line);
        let unsuitable = unsuitable.into_iter();
        (kept, unsuitable.map(|argument| argument.argument).collect())
    }

    #[test]
    fn arguments_that_hide_devices_or_the_console_are_found_on_each_architecture() {
        let all = "console=ttyS0 acpi=off pci=off noapic nomodule nolapic iommu=off acpi=force";
        let (x86, left_out) = kept("x86_64", all);
        assert_eq!(x86, "console=ttyS0 iommu=off acpi=force");
        let expected = ["acpi=off", "pci=off", "noapic", "nomodule", "nolapic"];
        assert_eq!(left_out, expected);
        let (arm, left_out) = kept("aarch64", all);
        assert_eq!(arm, "console=ttyS0 acpi=off noapic nolapic iommu=off");
        assert_eq!(left_out, ["pci=off", "nomodule", "acpi=force"]);
    }

    #[test]
    fn other_values_of_the_same_argument_stay() {
        let (line, left_out) = kept("x86_64", "pci=realloc,off,nomsi,noaer quiet");
        assert_eq!(line, "pci=realloc,noaer quiet");
        assert_eq!(left_out, ["pci=off", "pci=nomsi"]);
    }

    #[test]
    fn similar_words_are_passed_on_unchanged() {
        for line in [
            "",
            "pci=offset  x=pci=off",
            "noapictimer nomodule=0 pci acpi= pci=,",
            "dyndbg=\"file a pci=off nomodule\"",
            "quiet -- nomodule pci=off",
        ] {
            assert_eq!(kept("x86_64", line), (line.to_owned(), vec![]));
        }
    }
}
