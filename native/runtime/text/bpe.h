// Byte pair encoding: the neighbours whose merge stands first in the list become one, until none is in it.
#pragma once

#include <cstdint>
#include <queue>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "runtime/error.h"
#include "runtime/text/utf8.h"

namespace bellbox {

struct Bpe {
    struct Merge {
        uint32_t rank, made;
    };
    std::unordered_map<std::string, uint32_t> vocab;
    std::unordered_map<uint64_t, Merge> merges;  // by the left token's number, then the right one's
    bool byte_fallback = false, fuse_unknown = false, ignore_merges = false;
    bool has_unknown = false;
    uint32_t unknown = 0;

    static uint64_t pair(uint32_t left, uint32_t right) { return uint64_t{left} << 32 | right; }

    // Appends the tokens of a piece of text.
    void encode(const std::string& piece, std::vector<uint32_t>& out) const {
        if (ignore_merges)
            if (const auto whole = vocab.find(piece); whole != vocab.end()) return out.push_back(whole->second);
        std::vector<Symbol> symbols = symbols_of(piece);
        merge(symbols);
        for (const Symbol& each : symbols)
            if (each.alive) out.push_back(each.token);
    }

  private:
    struct Symbol {
        uint32_t token;
        int64_t before, after;  // places in the list; -1: none
        bool alive = true;
    };
    struct Candidate {
        uint32_t rank, made;
        int64_t at;
        // The queue gives the largest: of the lowest rank the leftmost.
        bool operator<(const Candidate& other) const { return rank != other.rank ? rank > other.rank : at > other.at; }
    };

    std::vector<Symbol> symbols_of(const std::string& piece) const {
        std::vector<Symbol> found;
        bool unknown_before = false;
        const auto add = [&](uint32_t token) {
            const int64_t at = static_cast<int64_t>(found.size());
            found.push_back({token, at - 1, -1});
            if (at > 0) found[static_cast<size_t>(at - 1)].after = at;
        };
        for (size_t at = 0; at < piece.size();) {
            const Character c = character_at(piece, at);
            const std::string text = piece.substr(at, c.length);
            at += c.length;
            if (const auto known = vocab.find(text); known != vocab.end()) {
                add(known->second), unknown_before = false;
                continue;
            }
            if (byte_fallback) {
                std::vector<uint32_t> bytes;
                for (const char byte : text)
                    if (const auto token = vocab.find(name_of(static_cast<unsigned char>(byte))); token != vocab.end())
                        bytes.push_back(token->second);
                if (bytes.size() == text.size()) {
                    for (const uint32_t token : bytes) add(token);
                    unknown_before = false;
                    continue;
                }
            }
            if (has_unknown && !(fuse_unknown && unknown_before)) add(unknown), unknown_before = true;
        }
        return found;
    }

    static std::string name_of(unsigned char byte) {
        constexpr char kDigits[] = "0123456789ABCDEF";
        return std::string("<0x") + kDigits[byte >> 4] + kDigits[byte & 15] + ">";
    }

    void merge(std::vector<Symbol>& symbols) const {
        std::priority_queue<Candidate> queue;
        const auto look = [&](int64_t left) {
            if (left < 0) return;
            const Symbol& first = symbols[static_cast<size_t>(left)];
            if (first.after < 0) return;
            const auto found = merges.find(pair(first.token, symbols[static_cast<size_t>(first.after)].token));
            if (found != merges.end()) queue.push({found->second.rank, found->second.made, left});
        };
        for (size_t i = 0; i < symbols.size(); ++i) look(static_cast<int64_t>(i));
        while (!queue.empty()) {
            const Candidate best = queue.top();
            queue.pop();
            Symbol& left = symbols[static_cast<size_t>(best.at)];
            if (!left.alive || left.after < 0) continue;
            Symbol& right = symbols[static_cast<size_t>(left.after)];
            const auto still = merges.find(pair(left.token, right.token));
            if (still == merges.end() || still->second.made != best.made) continue;  // of neighbours that are no more
            left.token = best.made, left.after = right.after, right.alive = false;
            if (right.after >= 0) symbols[static_cast<size_t>(right.after)].before = best.at;
            look(left.before), look(best.at);
        }
    }
};

}  // namespace bellbox
