//! Keys for the monitor.

/// Ctrl-a: the next key is for the monitor.
const ESCAPE: u8 = 0x01;
/// Ends the machine when it follows [`ESCAPE`].
const QUIT: u8 = b'x';

/// Splits typed bytes into those for the guest and commands to the monitor:
/// `Ctrl-a x` quits, `Ctrl-a Ctrl-a` sends one Ctrl-a. Before any other key
/// Ctrl-a is sent as well.
#[derive(Debug, Default)]
pub(super) struct Keys {
    escaped: bool,
}

impl Keys {
    /// Appends to `guest` its part of `typed`. Returns whether the user quit;
    /// the bytes after that are dropped.
    pub(super) fn filter(&mut self, typed: &[u8], guest: &mut Vec<u8>) -> bool {
        for &key in typed {
            let escaped = std::mem::take(&mut self.escaped);
            match key {
                QUIT if escaped => return true,
                ESCAPE if !escaped => self.escaped = true,
                ESCAPE => guest.push(ESCAPE),
                _ if escaped => guest.extend([ESCAPE, key]),
                _ => guest.push(key),
            }
        }
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Feeds the pieces in order.
    fn typed(pieces: &[&[u8]]) -> (Vec<u8>, bool) {
        let mut keys = Keys::default();
        let mut guest = Vec::new();
        let quit = pieces.iter().any(|piece| keys.filter(piece, &mut guest));
        (guest, quit)
    }

    #[test]
    fn ctrl_a_x_quits_also_when_typed_slowly() {
        assert_eq!(typed(&[b"ls\n\x01xrest"]), (b"ls\n".to_vec(), true));
        assert_eq!(typed(&[b"\x01", b"x"]), (vec![], true));
    }

    #[test]
    fn ctrl_a_twice_sends_it_once() {
        assert_eq!(typed(&[b"\x01\x01x"]), (b"\x01x".to_vec(), false));
        assert_eq!(typed(&[b"\x01\x01\x01\x01"]), (b"\x01\x01".to_vec(), false));
    }

    #[test]
    fn other_keys_pass_unchanged() {
        let all: Vec<u8> = (0..=255).filter(|&byte| byte != ESCAPE).collect();
        assert_eq!(typed(&[&all]), (all, false));
        assert_eq!(typed(&[b"\x01e"]), (b"\x01e".to_vec(), false));
    }
}
